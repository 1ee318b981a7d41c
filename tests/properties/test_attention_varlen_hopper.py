"""Packed sequences by the forward kernel of Hopper: where each ends, and in which order all come.

The emulator plays either GPU, so both kernels are held to the same cases here.
"""

import subprocess
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from cases import DEVICE, unless
from packed_cases import INF, NAN, packed

from tilewise import attention_varlen_with_lse, attention_with_lse, emulation, toolchain
from tilewise.check import check, failures
from tilewise.op import HALVES, OPS

HOPPER, BEFORE = "9", "8"  # of what architecture the GPU is
MIXED = ((1, 1), (0, 5), (130, 170), (3, 0), (67, 331), (0, 0), (200, 9))
SEEN = [{}, {"causal": True}, {"left": 33, "right": 66}, {"left": 150, "causal": True}]
ORDERS = ["forward", "reverse", "2", "3", "5", "7"]
CASES = [
    pytest.param(
        major, dtype, {"lengths": MIXED, "heads": 2, "kv_heads": 1, "past": 3, "dim": dim} | seen,
        id=f"{major}-{dtype}-{dim}-{seen}".replace("torch.", ""),
        marks=unless(dtype is torch.bfloat16 and major == HOPPER),
    )
    for major in (HOPPER, BEFORE)
    for dtype in sorted(HALVES, key=str)
    for dim in (64, 128)
    for seen in SEEN
]  # fmt: skip


def options_of(seen):
    options = {"causal": seen.get("causal", False)}
    if "left" in seen:
        options["window"] = (seen["left"], seen.get("right"))
    return options


def tensors_of(lengths, *, dim=64, heads=4, kv_heads=2, before=0, past=0, dtype=torch.bfloat16):
    """q, k, v, where sequences end, and the longest; rows that lie apart, and begin at 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    ends = [torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() + before for i in (0, 1)]

    def normal(count, total):
        rows = torch.randn(int(total) + past, count + 1, dim, generator=generator)
        return rows.to(DEVICE, dtype)[:, 1:]

    q = normal(heads, ends[0][-1]).transpose(0, 1).contiguous().transpose(0, 1)
    k, v = (normal(kv_heads, ends[1][-1]) for _ in range(2))
    return q, k, v, *(e.to(DEVICE) for e in ends), *(max(n[i] for n in lengths) for i in (0, 1))


def run(arguments, **options):
    return attention_varlen_with_lse(*arguments, **options, backend="cuda")


def rows_of(arguments, number):
    """Those of a sequence in q, k and v."""
    q, k = (slice(int(e[number]), int(e[number + 1])) for e in arguments[3:5])
    return q, k, k


def alone(arguments, number, **options):
    """What the kernel for sequences that are not packed has for one of them."""
    rows = zip(arguments[:3], rows_of(arguments, number), strict=True)
    heads = (t[own].transpose(0, 1)[None] for t, own in rows)
    out, lse = attention_with_lse(*heads, **options, backend="cuda")
    return out[0].transpose(0, 1), lse[0]


def assert_one_by_one(arguments, **options):
    """The bits are those of each sequence by itself; what is of none is 0, or no sum."""
    out, lse = run(arguments, **options)
    left = torch.ones(len(out), dtype=torch.bool, device=DEVICE)
    for number in range(len(arguments[3]) - 1):
        rows = rows_of(arguments, number)[0]
        left[rows] = False
        expected = alone(arguments, number, **options)
        assert torch.equal(out[rows], expected[0])
        assert torch.equal(lse[:, rows], expected[1])
    assert not out[left].any()
    assert bool((lse[:, left] == -INF).all())


@pytest.mark.parametrize("major, dtype, size", CASES)
def test_lengths_and_windows(play, major, dtype, size):
    play(major)
    results = check(OPS["attention_varlen_with_lse"], "cuda", dtype, size, DEVICE)
    assert not results[0].skipped
    assert all(r.ok for r in results), failures(results)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seen", SEEN, ids=str)
def test_packed_is_one_by_one(play, dim, seen):
    """More tiles than multiprocessors, of sequences of all lengths."""
    play(HOPPER)
    lengths = (*MIXED, (1, 300), (70, 70), (5, 2), (390, 390))
    assert_one_by_one(tensors_of(lengths, dim=dim, before=2, past=9), **options_of(seen))


def test_more_keys_than_stay_in_the_cache(play):
    """Then heads are worked on some at a time, of one sequence and not of the next."""
    play(HOPPER)
    lengths = ((130, 140), (260, 30000), (3, 300))
    arguments = tensors_of(lengths, dim=128, heads=10, kv_heads=5)
    assert_one_by_one(arguments, window=(40, 7))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seen", SEEN[:3], ids=str)
def test_nothing_of_another_sequence_is_seen(play, dim, seen):
    """Tiles go past the end of a sequence: there the next one begins, whatever it holds."""
    play(HOPPER)
    lengths = ((40, 170), (129, 9), (7, 250))
    arguments = tensors_of(lengths, dim=dim, before=5, past=11)
    clean = run(arguments, **options_of(seen))
    for number in range(len(lengths)):
        rows = rows_of(arguments, number)
        poisoned = []
        for t, own in zip(arguments[:3], rows, strict=True):
            poisoned.append(torch.full_like(t, NAN))
            poisoned[-1][own] = t[own]
        out, lse = run((*poisoned, *arguments[3:]), **options_of(seen))
        assert torch.equal(out[rows[0]], clean[0][rows[0]])
        assert torch.equal(lse[:, rows[0]], clean[1][:, rows[0]])
        assert not out[:5].any() and not out[-11:].any()


def test_the_longest_may_be_said_too_short(play):
    """What is left of a longer sequence is of none: it is neither seen nor written."""
    play(HOPPER)
    *tensors, ends_q, ends_k, _, _ = tensors_of(((150, 300), (20, 400)))
    out, lse = run((*tensors, ends_q, ends_k, 90, 250))
    assert not out[90:150].any()
    assert bool((lse[:, 90:150] == -INF).all())
    ends_q, ends_k = (
        torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        for ends in ((0, 90, 150, 170), (0, 250, 300, 550))
    )
    expected = run((*tensors, ends_q, ends_k, 150, 400))
    for own in (slice(90), slice(150, 170)):
        assert torch.equal(out[own], expected[0][own])
        assert torch.equal(lse[:, own], expected[1][:, own])


@pytest.mark.parametrize(
    "ends",
    [(0, 3, 900, 32), (0, 5, 3, 20), (-7, 3, 20, 32), (0, 3, 20, 2**31 - 1), (40, 50, 60, 70)],
)  # fmt: skip
@pytest.mark.parametrize("which", [3, 4])
def test_wrong_ends_lead_nowhere_else(play, ends, which):
    """The tensors are amid NaN: what is left is some answer."""
    play(HOPPER)
    arguments = list(tensors_of(((3, 3), (17, 17), (12, 12))))
    for i, t in enumerate(arguments[:3]):
        wide = torch.full((3 * len(t), *t.shape[1:]), NAN).to(t)
        wide[len(t) : 2 * len(t)] = t
        arguments[i] = wide[len(t) : 2 * len(t)]
    arguments[which] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    assert bool(run(arguments)[0].isfinite().all())


def as_they_are(*tensors):
    return tensors


def shifted(t):
    """The same from an address on where no 16 bytes begin."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return flat.view(t.shape).copy_(t)


TAKEN = {
    "plain": (64, as_they_are, {}),
    "wide": (128, as_they_are, {}),
    "causal": (64, as_they_are, {"causal": True}),
    "window": (128, as_they_are, {"window": (100, 50)}),
    "scale": (64, as_they_are, {"scale": 0.3}),
    "multi-query": (64, lambda q, k, v: (q, k[:, :1], v[:, :1]), {}),
}
LEFT = {
    "narrow": (32, as_they_are, {}),
    "v_dim": (128, lambda q, k, v: (q, k, v[..., :64]), {}),
    "shifted": (64, lambda q, k, v: (q, shifted(k), v), {}),
    "broadcast": (64, lambda q, k, v: (q, k[:, :1].expand_as(k), v), {}),
    "negative": (64, as_they_are, {"scale": -0.2}),
    "softcap": (64, as_they_are, {"softcap": 5.0}),
}


@pytest.mark.parametrize("case", [*TAKEN, *LEFT])
def test_which_kernel_it_is(play, case):
    """Both add up in another order: their bits differ where they are two."""
    dim, change, options = (TAKEN | LEFT)[case]
    arguments = tensors_of(((70, 400), (30, 90)), dim=dim)
    arguments = (*change(*arguments[:3]), *arguments[3:])
    found = []
    for major in (HOPPER, BEFORE):
        play(major)
        found.append(run(arguments, **options))
    assert torch.equal(found[0][1], found[1][1]) == (case in LEFT)


@pytest.mark.parametrize("major", [HOPPER, BEFORE])
@pytest.mark.parametrize("lengths", [((1, 1),), ((0, 1), (1, 0)), ((0, 0), (0, 0))], ids=str)
def test_hardly_any_rows(play, major, lengths):
    play(major)
    arguments = packed(lengths, dim=64, v_dim=64, dtype=torch.bfloat16)
    assert_one_by_one((*arguments[:-2], 5, 5))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_the_order(play, monkeypatch, dim, causal):
    """In which threads take turns, and copies come."""
    play(HOPPER)
    arguments = tensors_of(((70, 200), (1, 9), (150, 333)), dim=dim, dtype=torch.float16)
    found = []
    for order in ORDERS:
        monkeypatch.setenv("TILEWISE_EMULATION_ORDER", order)
        found.append(run(arguments, causal=causal))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


# --- Who works on what.

ITEMS = Path(__file__).parents[1] / "attention_items.cu"
BLOCKS = 132  # of an H200
SHARED_OUT = {
    "one": [8192],
    "long first": [16384, *[300] * 40],
    "long last": [*[300] * 40, 16384],
    "by turns": [2048, 64] * 12,
    "empty": [0, 700, 0, 0, 1500, 1, 0],
    "many": [1 + 37 * i % 257 for i in range(300)],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", SHARED_OUT.values(), ids=SHARED_OUT)
def test_blocks_share_all_there_is(lengths, causal):
    """Each tile of queries is some block's, and no block has much more to do than another."""
    if lacks := toolchain.lacking(module=False):
        pytest.skip(f"emulation: needs {lacks}")
    program = emulation.build_program([ITEMS])
    words = [4, 2, int(causal), BLOCKS, *(n for length in lengths for n in (length, length))]
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=True)
    items = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    begins = [0, *accumulate(lengths)]
    expected = [
        (first, head, query0)
        for first, length in zip(begins, lengths, strict=False)
        for head in range(4)
        for query0 in range(0, length, 192)
    ]
    assert sorted(item[1:4] for item in items) == expected
    work = Counter()
    for block, *_, keys in items:
        work[block] += keys
    longest = max(keys for *_, keys in items)
    assert max(work.values()) <= sum(work.values()) / BLOCKS + 2 * longest
