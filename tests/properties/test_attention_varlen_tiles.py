"""Packed sequences in 16 bits, several tiles long: what tensor cores make of them."""

from itertools import pairwise

import pytest
import torch
from cases import DEVICE
from packed_cases import INF, NAN, VARLEN, able, packed, with_gradients

from tilewise import attention_varlen, attention_with_lse
from tilewise.op import HALVES
from tilewise.rng import keep_mask

pytestmark = pytest.mark.thinned(3)

BACKENDS = pytest.mark.parametrize("backend", VARLEN.backends)
DTYPES = pytest.mark.parametrize("dtype", sorted(HALVES, key=str), ids=str)
LONG = ((70, 150), (0, 9), (140, 40), (33, 0), (1, 65))
LONGEST = 140, 150


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)


OPTIONS = {
    "plain": ((), {}),
    "causal": ((), {"causal": True}),
    "window": ((), {"window": (30, 20)}),
    "bias": ((normal(5, 1, *LONGEST),), {"causal": True}),
    "all": (
        (normal(1, 4, *LONGEST), normal(4)),
        {"alibi_slopes": normal(5, 4).abs(), "softcap": 2.0, "window": (90, 2), "scale": 0.3},
    ),
}


def long(dtype, *, whole=True, past=0):
    """Rows that can be moved 16 bytes at a time, if they are to be `whole`."""
    tensors = packed(LONG, dim=64, v_dim=48, past=past, dtype=dtype)
    return [t.contiguous() if whole and i < 3 else t for i, t in enumerate(tensors)]


def by_itself(number, rows, q, k, v, bias=None, sinks=None, *, slopes, weight, **options):
    """out, lse, dq, dk and dv of one sequence, by `attention`."""
    heads = [
        t[r].transpose(0, 1)[None].detach().requires_grad_()
        for t, r in zip((q, k, v), rows, strict=True)
    ]
    if bias is not None:
        seq_q, seq_k = (len(h[0, 0]) for h in heads[:2])
        bias = bias[number % len(bias), None, :, :seq_q, :seq_k].requires_grad_()  # delta is exact
    if slopes is not None:
        options["alibi_slopes"] = slopes[number]
    out, lse = attention_with_lse(*heads, bias, sinks, **options)
    loss = (out * weight[rows[0]].transpose(0, 1)[None]).sum() + lse.square().sum()
    grads = torch.autograd.grad(loss, heads)
    return [lse[0], *(t[0].transpose(0, 1) for t in (out, *grads))]


@DTYPES
@BACKENDS
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_are_those_of_attention(backend, name, whole, dtype):
    if backend != "cuda":
        pytest.skip(f"{backend}: has other tiles for packed sequences")
    more, options = OPTIONS[name]
    q, k, v, *ends, _, _ = arguments = long(dtype, whole=whole)
    out, lse, *grads = with_gradients(backend, *arguments, *more, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(dtype).view(out.shape)
    options = options | {"slopes": options.get("alibi_slopes"), "weight": weight}
    options.pop("alibi_slopes", None)
    for b, lengths in enumerate(LONG):
        own_q, own_k = (slice(int(e[b]), int(e[b + 1])) for e in ends)
        if 0 in lengths:
            assert not any(g[own_k].any() for g in grads[1:3])
            continue
        expected = by_itself(b, (own_q, own_k, own_k), q, k, v, *more, **options, backend=backend)
        rows = (own_q, own_q, own_k, own_k)
        ours = (t[r] for t, r in zip((out, *grads[:3]), rows, strict=True))
        assert all(map(torch.equal, (lse[:, own_q], *ours), expected))


@DTYPES
@BACKENDS
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_rows_of_no_sequence_are_never_seen(backend, name, poison, dtype):
    more, options = OPTIONS[name]
    clean = with_gradients(backend, *long(dtype, past=70), *more, **options)
    poisoned = long(dtype, past=70)
    for t in poisoned[:3]:
        t[-70:] = poison
    if more:
        bias = more[0].expand(5, -1, -1, -1).clone()
        clean[5] = with_gradients(backend, *long(dtype, past=70), bias, more[1], **options)[5]
        for b, (seq_q, seq_k) in enumerate(LONG):
            bias[b, :, seq_q:] = poison
            bias[b, :, :, seq_k:] = poison
        more = (bias, more[1])
    ours = with_gradients(backend, *poisoned, *more, **options)
    assert all(map(torch.equal, ours, clean))
    out, lse, *grads = ours
    assert not out[-70:].any() and bool((lse[:, -70:] == -INF).all())
    assert not any(g[-70:].any() for g in grads[:3])


@DTYPES
@BACKENDS
def test_of_a_sequence_that_is_too_long_the_rest_does_not_count(backend, dtype):
    *tensors, longest_q, longest_k = long(dtype)
    whole = with_gradients(backend, *tensors, longest_q, longest_k)
    longer = with_gradients(backend, *tensors, longest_q + 300, longest_k + 9000)
    assert all(map(torch.equal, longer, whole))
    out, lse, dq, *_ = with_gradients(backend, *tensors, 50, longest_k)
    kept = torch.zeros(len(out), dtype=torch.bool, device=DEVICE)
    for begin, end in pairwise(tensors[3].tolist()):
        kept[begin : min(begin + 50, end)] = True
    assert torch.equal(out[kept], whole[0][kept]) and torch.equal(dq[kept], whole[2][kept])
    assert not out[~kept].any() and not dq[~kept].any() and bool((lse[:, ~kept] == -INF).all())
    out, *_, dk, dv = with_gradients(backend, *tensors, longest_q, 30)
    kept = torch.zeros(len(dk), dtype=torch.bool, device=DEVICE)
    for begin, end in pairwise(tensors[4].tolist()):
        kept[begin : min(begin + 30, end)] = True
    assert not dk[~kept].any() and not dv[~kept].any() and bool(dv[kept].any())


@DTYPES
@BACKENDS
@pytest.mark.parametrize(
    "ends",
    [(0, 3, 900, 32), (0, 5, 3, 20), (-7, 3, 20, 32), (0, 3, 20, 2**31 - 1), (40, 50, 60, 70),
     (-(2**31), 2**31 - 1, 4, 9)],
)  # fmt: skip
@pytest.mark.parametrize("which", [3, 4])
def test_wrong_ends_lead_nowhere_else(backend, ends, which, dtype):
    if backend == "triton":
        pytest.skip("triton: test_attention_varlen_rows has it, and what its sanitizer may find")
    arguments = list(packed(((3, 3), (17, 17), (12, 12)), dtype=dtype))
    arguments[which] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    assert all(bool(t.isfinite().all()) for t in with_gradients(backend, *arguments)[2:])


@DTYPES
@BACKENDS
def test_dropout_counts_sequences_heads_and_positions(backend, dtype):
    lengths = ((3, 5), (70, 4), (20, 33))
    q, k, _, *rest = packed(lengths, dtype=dtype)
    drop = {"dropout_p": 0.4, "seed": -(2**62), "offset": 2**33}
    v = torch.zeros(len(k), 2, 33, device=DEVICE, dtype=dtype)
    for b, (_, seq_k) in enumerate(lengths):
        v[int(rest[1][b]) :][:seq_k] = torch.eye(33, device=DEVICE, dtype=dtype)[:seq_k, None]
    able(backend, q, k, v, *rest, **drop)
    out = attention_varlen(q, k, v, *rest, **drop, backend=backend)
    for b, (seq_q, seq_k) in enumerate(lengths):
        rows = (b * 4 + torch.arange(4, device=DEVICE)) * rest[2]
        rows = rows + torch.arange(seq_q, device=DEVICE)[:, None]
        kept = keep_mask(drop["dropout_p"], drop["seed"], drop["offset"], rows, seq_k)
        own = out[int(rest[0][b]) : int(rest[0][b + 1])]
        assert torch.equal(own[..., :seq_k] != 0, kept)
