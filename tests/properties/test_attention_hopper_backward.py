"""Attention in CUDA C++ has backward kernels of Hopper's own: what they take, and that they are
right. All lengths and windows are in `test_attention_hopper.py`, which holds gradients too.
"""

import math

import pytest
import torch
from test_attention_hopper import BEFORE, HOPPER, LEFT, ORDERS, SEEN, TAKEN, spread, tensors_of
from torch.nn.functional import pad

from tilewise.check import Result, failures, standard_of
from tilewise.op import OPS

WITH_LSE = OPS["attention_with_lse"]
# Queries come 64 at a time, keys 128: one of each too many, too few, and more than go in the ring.
EDGES = [(64, 128), (65, 129), (63, 127), (320, 40)]


def numbers_of(tensors, options):
    """What the ops take after the tensors."""
    left, right = options.get("window", (-1, -1))
    right = 0 if options.get("causal") else right
    scale = options.get("scale", tensors[0].shape[-1] ** -0.5)
    seeded = (options.get("dropout_p", 0.0), None, None, options.get("seed", 0), 0)
    return None, None, None, None, (left, right, options.get("softcap", 0.0), scale, *seeded)


def results_of(tensors, **options):
    """out, highest and total of the forward pass."""
    *others, numbers = numbers_of(tensors, options)
    return torch.ops.tilewise.attention_forward(*tensors, *others, *numbers, "cuda")


def backward(tensors, cotangents, results=None, *, wanted=(True, True, True), **options):
    """out, lse, dq, dk and dv by the kernels alone, from gradients of any strides."""
    out, highest, total = results = results or results_of(tensors, **options)
    *others, numbers = numbers_of(tensors, options)
    grads = torch.ops.tilewise.attention_backward(
        *cotangents, *tensors, *others, *results, *numbers, *wanted, False, False, "cuda"
    )
    return out, math.log(2) * highest + total.log(), *grads[:3]


def cotangents_of(tensors):
    """As `tilewise.check` draws them, of out and lse."""
    q, _, v = tensors
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn((*q.shape[:3], v.shape[-1]), generator=generator).to(q)
    return dout, torch.randn(q.shape[:3], generator=generator).to(q.device)


def assert_right(ours, tensors, **options):
    standard = standard_of(WITH_LSE, (*tensors, None, None), options)
    case = Result("attention_with_lse", "cuda", str(tensors[0].device), str(tensors[0].dtype), {})
    results = standard.judge(ours, case)
    assert all(r.ok for r in results), failures(results)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seq_q, seq_k", EDGES)
def test_ends_of_tiles(play, seq_q, seq_k, dim):
    play(HOPPER)
    tensors = tensors_of(seq_q=seq_q, seq_k=seq_k, dim=dim)
    cotangents = cotangents_of(tensors)
    for options in ({}, {"causal": True}):
        assert_right(backward(tensors, cotangents, **options), tensors, **options)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seen", SEEN[:3], ids=str)
def test_many_heads_and_tiles(play, dim, seen):
    """More blocks than multiprocessors; tiles that go round the ring more than once."""
    play(HOPPER)
    options = {"causal": True} if "causal" in seen else {}
    if "left" in seen:
        options = {"window": (seen["left"], seen["right"])}
    tensors = tensors_of(torch.float16, batch=2, kv_heads=1, seq_q=330, seq_k=270, dim=dim)
    assert_right(backward(tensors, cotangents_of(tensors), **options), tensors, **options)


@pytest.mark.parametrize("seq_q, seq_k", [(40000, 130), (130, 40000)])
def test_more_than_stays_in_the_cache(play, seq_q, seq_k):
    """Then heads are worked on some at a time. Of one side the other sees only the end."""
    play(HOPPER)
    tensors = tensors_of(seq_q=seq_q, seq_k=seq_k, dim=128)
    last = [t[:, :, -170:] for t in tensors]
    dout, dlse = cotangents_of(last)
    before = seq_q - dout.shape[2]
    cotangents = (pad(dout, (0, 0, before, 0), value=1.0), pad(dlse, (before, 0), value=1.0))
    ours = backward(tensors, cotangents, window=(30, 9))
    assert_right([t[:, :, -170:] for t in ours], last, window=(30, 9))
    assert not any(t[:, :, :-170].any() for t in ours[2:])


def followed_by_nan(t):
    """The same as the beginning of longer heads."""
    longer = torch.full((*t.shape[:2], t.shape[2] + 70, t.shape[3]), torch.nan).to(t)
    longer[:, :, : t.shape[2]] = t
    return longer[:, :, : t.shape[2]]


@pytest.mark.parametrize("change", [spread, followed_by_nan])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_lies_between_and_beyond_never_counts(play, dim, change):
    play(HOPPER)
    tensors = tensors_of(seq_q=90, seq_k=150, dim=dim)
    dout, dlse = cotangents_of(tensors)
    ours = backward([change(t) for t in tensors], (change(dout), dlse), window=(40, 20))
    assert_right(ours, tensors, window=(40, 20))


def test_a_query_that_sees_nothing(play):
    """Has no gradient, and gives none, though dlse is not 0."""
    play(HOPPER)
    tensors = tensors_of(seq_q=200, seq_k=90, dim=64)
    dout, dlse = cotangents_of(tensors)
    ours = backward(tensors, (dout, dlse), causal=True)
    assert_right(ours, tensors, causal=True)
    assert not ours[2][:, :, :110].any()
    nothing = torch.where(torch.arange(200) < 110, torch.inf, dlse.cpu()).to(dlse)
    others = backward(tensors, (dout, nothing), causal=True)
    assert all(torch.equal(one, other) for one, other in zip(ours[2:], others[2:], strict=True))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True)])
def test_what_is_not_wanted_changes_nothing(play, wanted):
    play(HOPPER)
    tensors = tensors_of(seq_q=150, seq_k=200, dim=64)
    cotangents = cotangents_of(tensors)
    whole, part = (backward(tensors, cotangents, wanted=w) for w in ((True,) * 3, wanted))
    for asked, one, other in zip(wanted, whole[2:], part[2:], strict=True):
        assert torch.equal(one, other) if asked else other.numel() == 0


@pytest.mark.parametrize("case", [*TAKEN, *LEFT])
def test_which_kernel_it_is(play, case):
    """As in the forward pass: bits differ where there are two kernels. Of the same results."""
    dim, change, options = (TAKEN | LEFT)[case]
    tensors = change(*tensors_of(torch.float16, heads=2, seq_q=300, seq_k=270, dim=dim))
    cotangents, results = cotangents_of(tensors), results_of(tensors, **options)
    found = []
    for major in (HOPPER, BEFORE):
        play(major)
        found.append(backward(tensors, cotangents, results, **options)[2:])
    alike = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    assert alike == [case in LEFT] * 3


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_the_order(play, monkeypatch, dim, causal):
    """In which blocks and threads take turns, and copies come. More tiles than go in a ring."""
    play(HOPPER)
    tensors = tensors_of(torch.float16, heads=2, kv_heads=1, seq_q=150, seq_k=530, dim=dim)
    cotangents = cotangents_of(tensors)
    found = []
    for order in ORDERS:
        monkeypatch.setenv("TILEWISE_EMULATION_ORDER", order)
        found.append(backward(tensors, cotangents, causal=causal))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
