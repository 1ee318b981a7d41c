"""Attention in CUDA C++ has a forward kernel of Hopper's own: what it takes, and that it is right.

The emulator plays either GPU, so both kernels are held to the same cases here.
"""

from ctypes import CDLL, c_int64

import pytest
import torch
from cases import DEVICE, unless

from tilewise import attention, attention_with_lse, emulation, native
from tilewise.check import check, compare, failures, standard_of
from tilewise.op import HALVES, OPS
from tilewise.ops.attention import ATTENTION

HOPPER, BEFORE = "9", "8"  # of what architecture the GPU is
LENGTHS = [(1, 1), (1, 799), (113, 203), (239, 1), (257, 511)]
SEEN = [{}, {"causal": True}, {"left": 33, "right": 66}, {"left": 150, "causal": True}]
HEADS = {"batch": 1, "heads": 4, "kv_heads": 2}
ORDERS = ["forward", "reverse", "2", "3", "5", "7"]
CASES = [
    pytest.param(
        major, dtype, {"heads": 2, "kv_heads": 1, "seq_q": q, "seq_k": k, "dim": dim} | seen,
        id=f"{major}-{dtype}-{q}-{k}-{dim}-{seen}".replace("torch.", ""),
        marks=unless(dtype is torch.bfloat16 and (major == HOPPER or (q, k) == (113, 203))),
    )
    for major in (HOPPER, BEFORE)
    for dtype in sorted(HALVES, key=str)
    for q, k in LENGTHS
    for dim in (64, 128)
    for seen in SEEN
]  # fmt: skip


def tensors_of(dtype=torch.bfloat16, **size):
    torch.manual_seed(0)
    (q, k, v, *_), _ = ATTENTION.inputs(**HEADS | size, device=DEVICE, dtype=dtype)
    return q, k, v


def error_of(out, tensors, **options):
    """How far out is from the truth, and how far it may be."""
    standard = standard_of(ATTENTION, (*tensors, None, None), options)
    return compare(out, standard.plain[0], standard.truth[0])


@pytest.mark.parametrize("major, dtype, size", CASES)
def test_lengths_and_windows(play, major, dtype, size):
    play(major)
    results = check(OPS["attention_with_lse"], "cuda", dtype, {"batch": 1} | size, DEVICE)
    assert not results[0].skipped
    assert all(r.ok for r in results), failures(results)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seen", SEEN[:3], ids=str)
def test_many_heads_and_tiles(play, dim, seen):
    """More tiles of queries than multiprocessors; keys that go round the ring more than once."""
    play(HOPPER)
    options = {"causal": True} if "causal" in seen else {}
    if "left" in seen:
        options = {"window": (seen["left"], seen["right"])}
    tensors = tensors_of(batch=2, heads=6, seq_q=200, seq_k=900, dim=dim)
    out = attention(*tensors, **options, backend="cuda")
    error, allowed = error_of(out, tensors, **options)
    assert error <= allowed


def test_more_keys_than_stay_in_the_cache(play):
    """Then heads are worked on some at a time. Of all the keys a window shows only the last."""
    play(HOPPER)
    q, k, v = tensors_of(heads=10, kv_heads=5, seq_q=260, seq_k=40000, dim=128)
    out = attention(q, k, v, window=(40, 7), backend="cuda")
    seen = [t[:, :, -310:] for t in (k, v)]
    error, allowed = error_of(out, (q, *seen), window=(40, 7))
    assert error <= allowed


def spread(t):
    """The same as a view of [batch, seq, heads, dim] with other heads between."""
    wide = torch.full((t.shape[0], t.shape[2], 2 * t.shape[1], t.shape[3]), torch.nan).to(t)
    wide[:, :, ::2] = t.transpose(1, 2)
    return wide[:, :, ::2].transpose(1, 2)


def shifted(t):
    """The same from an address on where no 16 bytes begin."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return flat.view(t.shape).copy_(t)


def as_they_are(*tensors):
    return tensors


TAKEN = {
    "plain": (64, as_they_are, {}),
    "wide": (128, as_they_are, {}),
    "causal": (64, as_they_are, {"causal": True}),
    "window": (128, as_they_are, {"window": (100, 50)}),
    "scale": (64, as_they_are, {"scale": 0.3}),
    "spread": (64, lambda *t: tuple(map(spread, t)), {}),
    "multi-query": (64, lambda q, k, v: (q, k[:, :1], v[:, :1]), {}),
}
LEFT = {
    "narrow": (32, as_they_are, {}),
    "other": (96, as_they_are, {}),
    "v_dim": (128, lambda q, k, v: (q, k, v[..., :64]), {}),
    "shifted": (64, lambda q, k, v: (q, shifted(k), v), {}),
    "broadcast": (64, lambda q, k, v: (q, k[:, :1].expand_as(k), v), {}),
    "negative": (64, as_they_are, {"scale": -0.2}),
    "softcap": (64, as_they_are, {"softcap": 5.0}),
    "dropout": (64, as_they_are, {"dropout_p": 0.2, "seed": 1}),
}


@pytest.mark.parametrize("case", [*TAKEN, *LEFT])
def test_which_kernel_it_is(play, case):
    """Both are right, and add up in another order: their bits differ where they are two."""
    dim, change, options = (TAKEN | LEFT)[case]
    tensors = change(*tensors_of(seq_q=70, seq_k=400, dim=dim))
    found = []
    for major in (HOPPER, BEFORE):
        play(major)
        found.append(attention_with_lse(*tensors, **options, backend="cuda"))
    (out, lse), (out_before, lse_before) = found
    assert torch.equal(lse, lse_before) == (case in LEFT)
    if case in LEFT:
        assert torch.equal(out, out_before)
    if "dropout_p" not in options:
        error, allowed = error_of(out, tensors, **options)
        assert error <= allowed


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_the_order(play, monkeypatch, dim, causal):
    """In which threads take turns, and copies come."""
    play(HOPPER)
    tensors = tensors_of(torch.float16, heads=6, seq_q=150, seq_k=560, dim=dim)
    found = []
    for order in ORDERS:
        monkeypatch.setenv("TILEWISE_EMULATION_ORDER", order)
        found.append(attention_with_lse(*tensors, causal=causal, backend="cuda"))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


# --- Maps for the copy engine.

KERNELS = "tilewise.kernels.cuda.attention"
MAPS = {
    "again": (0, as_they_are, {}),
    "address": (1, lambda q, k, v: (q, k.clone(), v), {}),
    "size": (2, lambda q, k, v: (q, k[:, :, :-3], v[:, :, :-3]), {}),
    "stride": (1, lambda q, k, v: (q.as_strided(q.shape, (*q.stride()[:2], 136, 1)), k, v), {}),
    "box": (2, as_they_are, {"causal": True}),  # of fewer keys
    "dtype": (4, lambda *tensors: tuple(t.view(torch.float16) for t in tensors), {}),
}


@pytest.mark.parametrize("case", MAPS)
def test_a_map_is_made_once(play, monkeypatch, case):
    """A launch makes no map that was made before: only of what is another tensor, or box."""
    play(HOPPER)
    if not native.EMULATED:
        pytest.skip("cuda: only the emulator counts the maps that are made")
    made = c_int64.in_dll(CDLL(str(emulation.find())), "tilewise_tensor_maps_made")
    q, k, v = tensors_of(seq_q=35, seq_k=173 + list(MAPS).index(case), dim=128)
    q = torch.cat([q, q, q], 2)[:, :, :35]  # with room for another stride
    out = attention(q, k, v, backend="cuda")

    def launch(q, k, v, **options):
        """How many maps were made, and the error of the result by what it may be."""
        monkeypatch.setattr(f"{KERNELS}._laid_out", lambda *_: out.view(q.dtype))
        before = made.value
        result = attention(q, k, v, **options, backend="cuda")
        error, allowed = error_of(result, (q, k, v), **options)
        return made.value - before, error / allowed

    count, change, options = MAPS[case]
    assert launch(q, k, v)[1] <= 1
    tensors = change(q, k, v)
    for expected in (count, 0):
        found, error = launch(*tensors, **options)
        assert found == expected
        assert error <= 1
