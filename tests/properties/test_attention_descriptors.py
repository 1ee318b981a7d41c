"""Attention in Triton streams long sequences by tensor descriptors, where their strides allow it.

The interpreter plays a GPU without a copy engine, so here it is told otherwise, and all is long.
"""

import importlib

import pytest
import torch
from cases import DEVICE, interpreted

from tilewise import attention_varlen
from tilewise.check import check, failures
from tilewise.choice import refusal
from tilewise.op import HALVES, OPS
from tilewise.ops.attention import ATTENTION

BASE = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 40, "seq_k": 70}
SIZES = [
    BASE | {"dim": 64},
    BASE | {"dim": 64, "causal": True},
    BASE | {"dim": 80, "left": 33, "right": 20},  # a tile is wider than the tensor
    BASE | {"dim": 48, "v_dim": 128, "causal": True},
    {"batch": 2, "heads": 6, "kv_heads": 2, "seq_q": 65, "seq_k": 30, "dim": 64, "causal": True},
    BASE | {"dim": 64, "bias": "hqk", "sinks": True},
    BASE | {"dim": 64, "mask": "qk", "dropout_p": 0.3},
    BASE | {"dim": 64, "alibi": "h", "softcap": 5.0, "causal": True},
]


@pytest.fixture
def described(monkeypatch):
    """How many tensors were described."""
    some = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    if no := refusal(ATTENTION.backends["triton"], some, some, some):
        pytest.skip(f"triton: {no[1]}")
    module = importlib.import_module("tilewise.kernels.triton._attention_tiles")
    if not interpreted("triton") and not module.has_copy_engine():
        pytest.skip("triton: the GPU has no copy engine")
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "has_copy_engine", lambda: True)
    made = []

    def describe(t, rows, cols, descriptor_of=module.descriptor_of):
        made.append(t.shape)
        return descriptor_of(t, rows, cols)

    monkeypatch.setattr(module, "descriptor_of", describe)
    return made


def tensors_of(dtype=torch.bfloat16, **size):
    """q, k, v and what comes back to out, contiguous."""
    torch.manual_seed(0)
    (q, k, v, *_), _ = ATTENTION.inputs(**BASE | size, device=DEVICE, dtype=dtype)
    return q, k, v, torch.randn_like(q[..., : v.shape[-1]])


def run(q, k, v, dout, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ATTENTION.call(*leaves, **options, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", sorted(HALVES, key=str), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_right_by_the_rule(described, dtype, size):
    results = check(OPS["attention"], "triton", dtype, size, DEVICE)
    assert not results[0].skipped
    assert all(r.ok for r in results), failures(results)
    assert len(described) == 6  # keys and values twice, queries and what comes back to out once


def gapped(t):
    """The same with NaN between its rows, behind its heads and around it."""
    return torch.nn.functional.pad(t, (0, 8, 0, 3), value=float("nan"))[..., :-3, :-8]


def by_rows(t):
    """The same laid out as [batch, seq, heads, dim]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("laid_out", [gapped, by_rows], ids=["gapped", "by_rows"])
@pytest.mark.parametrize("dim", [40, 64])
def test_where_rows_lie_changes_no_bit(described, laid_out, dim):
    tensors = tensors_of(dim=dim)
    pairs = zip(run(*map(laid_out, tensors)), run(*tensors), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(described) == 12


def shifted(t):
    """The same from an address on where no 16 bytes begin."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return flat.view(t.shape).copy_(t)


def narrow_gap(t):
    return torch.nn.functional.pad(t, (0, 2))[..., :-2]


def same_row(t):
    return t[:, :, :1].expand_as(t)


@pytest.mark.parametrize("bent, others", [(0, 4), (1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("bend", [shifted, narrow_gap, same_row])
def test_what_has_no_descriptor_is_read_by_pointers(described, bend, bent, others):
    """With what streams beside it; the other loops have theirs."""
    tensors = list(tensors_of(dim=64))
    tensors[bent] = bend(tensors[bent])
    run(*tensors)
    assert len(described) == others


def test_keys_that_are_hidden_are_not_read(described):
    q, k, v, dout = tensors_of(dim=64)
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[..., 10:50] = False
    clean = run(q, k, v, dout, mask=mask)
    k[:, :, 10:50], v[:, :, 10:50] = float("nan"), float("nan")
    pairs = zip(run(q, k, v, dout, mask=mask), clean, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(described) == 4  # of each, queries and what comes back to out


def test_what_else_is_read_by_pointers(described, monkeypatch):
    tensors = tensors_of(torch.float32, dim=16)
    run(*tensors)
    packed = [t.to(torch.bfloat16)[0].transpose(0, 1) for t in tensors[:3]]
    ends = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (40, 70)]
    attention_varlen(*packed, *ends, 40, 70, backend="triton")
    assert not described
    module = importlib.import_module("tilewise.kernels.triton._attention_tiles")
    monkeypatch.setattr(module, "LARGE", 40 * 70 * 2 * 32)
    run(*(t.to(torch.bfloat16) for t in tensors))
    assert len(described) == 6
    monkeypatch.setattr(module, "LARGE", 40 * 70 * 2 * 32 + 1)
    run(*(t.to(torch.bfloat16) for t in tensors))
    assert len(described) == 6


@pytest.mark.parametrize("window", [None, (30, 4), (0, 0)])
def test_a_bias_of_every_score_has_its_gradient_from_the_kernel_of_dq(described, window):
    """Zero where a window hides; the same as that of a bias that all of a batch shares."""
    tensors = [t.repeat(2, 1, 1, 1) for t in tensors_of(dim=64, seq_k=300)]
    tensors[0].requires_grad_()
    leaf = torch.randn(2, 2, 40, 300, dtype=torch.bfloat16, device=DEVICE)
    shared = leaf[:1].clone().requires_grad_()
    leaf = leaf[:1].repeat(2, 1, 1, 1).requires_grad_()
    outs = [
        ATTENTION.call(*tensors[:3], bias, softcap=1.0, window=window, backend="triton")
        for bias in (leaf, shared)
    ]
    (own, dq), (both, other_dq) = (
        torch.autograd.grad(out, (bias, tensors[0]), tensors[3])
        for out, bias in zip(outs, (leaf, shared), strict=True)
    )
    assert len(described) == 2 * 2 * 2 + (8 if window == (0, 0) else 4)
    assert torch.equal(own[0], own[1])
    assert torch.equal(dq, other_dq)
    torch.testing.assert_close(2 * own[:1], both, rtol=2**-6, atol=2**-8 * float(both.abs().max()))
    if window is not None:
        away = torch.arange(300, device=DEVICE) - torch.arange(260, 300, device=DEVICE)[:, None]
        assert not own[..., (away < -window[0]) | (away > window[1])].any()
