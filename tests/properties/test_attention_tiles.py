"""Attention in 16 bits: the edges of tiles, whole accesses and rows that allow none, poison."""

from itertools import pairwise

import pytest
import torch
from cases import DEVICE, interpreted

from tilewise.check import check, compare, failures, standard_of
from tilewise.choice import refusal
from tilewise.op import HALVES, OPS
from tilewise.ops.attention import ATTENTION

BASE = {"batch": 1, "heads": 2, "kv_heads": 1}
LENGTHS = [(1, 799), (113, 203), (239, 1), (64, 192), (128, 128), (129, 130), (257, 63)]
SEEN = [
    {}, {"causal": True}, {"left": 64, "causal": True}, {"left": 33, "right": 66},
    {"left": 0, "right": 1}, {"right": 127}, {"left": 10**12, "right": 10**12},
]  # fmt: skip
SIZES = [
    *(BASE | {"seq_q": q, "seq_k": k, "dim": 32, "causal": True} for q, k in LENGTHS),
    *(BASE | {"seq_q": 150, "seq_k": 200, "dim": 64} | seen for seen in SEEN),
    *(BASE | {"seq_q": 200, "seq_k": 150, "dim": 128} | seen for seen in SEEN),
    BASE | {"seq_q": 70, "seq_k": 70, "dim": 96, "v_dim": 64, "causal": True},
    BASE | {"seq_q": 70, "seq_k": 70, "dim": 8, "v_dim": 128},
    {"batch": 2, "heads": 6, "kv_heads": 2, "seq_q": 65, "seq_k": 130, "dim": 64, "causal": True},
    BASE | {"seq_q": 70, "seq_k": 140, "dim": 64, "mask": "bk", "dropout_p": 0.3, "sinks": True},
    BASE | {"seq_q": 70, "seq_k": 70, "dim": 128, "mask": "qk", "bias": "hqk", "softcap": 2.0},
    BASE | {"seq_q": 140, "seq_k": 70, "dim": 128, "dropout_p": 0.5, "alibi": "h", "left": 40},
]


def able(backend, *tensors, **options):
    if interpreted(backend) and DEVICE == "cpu":
        pytest.skip(f"{backend}: slow in the interpreter, and the declared sizes have it")
    if no := refusal(ATTENTION.backends[backend], *tensors, **options):
        pytest.skip(f"{backend}: {no[1]}")


EVERY = pytest.mark.parametrize("backend", ATTENTION.backends)


@EVERY
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
def test_edges_of_tiles(backend, size, name):
    if name == "attention_with_lse" and "left" not in size:
        pytest.skip("lse: the windows have it")
    able(backend, *[torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=DEVICE)] * 3)
    results = check(OPS[name], backend, torch.bfloat16, size, DEVICE)
    assert not results[0].skipped
    assert all(r.ok for r in results), failures(results)


def tensors_of(dtype, **size):
    """q, k, v and what comes back to out, contiguous."""
    torch.manual_seed(0)
    (q, k, v, *_), _ = ATTENTION.inputs(**BASE | size, device=DEVICE, dtype=dtype)
    return q, k, v, torch.randn_like(q[..., : v.shape[-1]])


def run(backend, q, k, v, dout, **options):
    able(backend, q, k, v, **options)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ATTENTION.call(*leaves, **options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def by_rows(t, gap):
    """Laid out as [seq, batch, heads, dim], with a gap of elements between rows."""
    wide = torch.nn.functional.pad(t, (0, gap), value=float("nan"))
    return wide.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)[..., : t.shape[-1]]


@EVERY
@pytest.mark.parametrize("dtype", sorted(HALVES, key=str), ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_where_rows_lie_changes_no_bit(backend, dtype, dim):
    """As long as they can be read alike: the gaps are whole accesses."""
    tensors = tensors_of(dtype, seq_q=70, seq_k=90, dim=dim)
    moved = [by_rows(t, 8 * (i + 1)) for i, t in enumerate(tensors)]
    pairs = zip(run(backend, *moved), run(backend, *tensors), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@EVERY
@pytest.mark.parametrize("bent", range(4), ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("gap", [1, 2])
def test_rows_that_cannot_be_read_sixteen_bytes_at_a_time(backend, bent, gap):
    tensors = list(tensors_of(torch.bfloat16, seq_q=70, seq_k=90, dim=64))
    expected = run(backend, *tensors)
    tensors[bent] = by_rows(tensors[bent], gap)
    for ours, theirs in zip(run(backend, *tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-7 * float(theirs.abs().max()))


@EVERY
@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_around_and_behind_padding_is_never_seen(backend, dim, poison):
    q, k, v, dout = tensors_of(torch.bfloat16, seq_q=33, seq_k=90, dim=dim)
    mask = torch.ones(1, 1, 1, 90, dtype=torch.bool, device=DEVICE)
    mask[..., 10:70] = False
    clean = run(backend, q, k, v, dout, mask=mask)
    around = [torch.nn.functional.pad(t, (8, 8, 9, 9), value=poison) for t in (q, k, v, dout)]
    q, k, v, dout = (t[:, :, 9:-9, 8:-8] for t in around)
    k[:, :, 10:70], v[:, :, 10:70] = poison, poison
    pairs = zip(run(backend, q, k, v, dout, mask=mask), clean, strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@EVERY
def test_a_key_that_one_head_sees_is_not_poison_for_the_other(backend):
    """Heads share keys, but not what hides them."""
    q, k, v, dout = tensors_of(torch.bfloat16, seq_q=20, seq_k=40, dim=64)
    mask = torch.ones(1, 2, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 0, :, 30:] = False
    clean = run(backend, q, k, v, dout, mask=mask)
    k[:, :, 30:], v[:, :, 30:] = float("nan"), float("nan")
    out, dq, *_ = run(backend, q, k, v, dout, mask=mask)
    assert torch.equal(out[:, 0], clean[0][:, 0])
    assert torch.equal(dq[:, 0], clean[1][:, 0])
    assert out[:, 1].isnan().all()
    assert dq[:, 1].isnan().all()


@EVERY
def test_nothing_to_attend_to_is_zero(backend):
    q, k, v, dout = tensors_of(torch.bfloat16, seq_q=200, seq_k=70, dim=64)
    out, dq, *_ = run(backend, q, k, v, dout, causal=True)
    assert not out[:, :, :130].any()
    assert not dq[:, :, :130].any()
    assert out[:, :, 130:].any(-1).all()
    none = torch.zeros(1, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    assert not any(t.any() for t in run(backend, q, k, v, dout, mask=none))


@EVERY
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.4, "seed": 3}], ids=str)
def test_twenty_runs_have_the_same_bits(backend, options):
    tensors = tensors_of(torch.float16, seq_q=70, seq_k=90, dim=64)
    runs = [torch.cat([t.flatten() for t in run(backend, *tensors, **options)]) for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in pairwise(runs))


@EVERY
@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_any_scale(backend, scale):
    q, k, v, _ = tensors_of(torch.bfloat16, seq_q=70, seq_k=90, dim=64)
    able(backend, q, k, v, scale=scale)
    standard = standard_of(ATTENTION, (q, k, v, None, None), {"scale": scale})
    out = ATTENTION.call(q, k, v, scale=scale, backend=backend)
    error, allowed = compare(out, standard.plain[0], standard.truth[0])
    assert error <= allowed
