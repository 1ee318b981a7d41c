"""Queries, keys and values for the tests of attention, each laid out in its own way."""

import pytest
import torch
from cases import DEVICE

from tilewise import attention
from tilewise.choice import refusal
from tilewise.ops.attention import ATTENTION

EVERY = pytest.mark.parametrize("backend", [*ATTENTION.backends, "reference"])


def inputs(seq_q, seq_k, *, batch=2, heads=2, kv_heads=1, dim=8, v_dim=8, dtype=torch.float32):
    """q, k and v: a swapped stride must not go unseen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    q = normal(batch, seq_q, heads, dim).transpose(1, 2)
    k = normal(kv_heads, batch, seq_k + 3, dim)[:, :, 3:].transpose(0, 1)
    v = normal(batch, kv_heads, seq_k, v_dim + 5)[..., 5:]
    return q, k, v


def able(backend, *tensors, **options):
    """Skip aloud what `backend` cannot take."""
    if backend != "reference" and (no := refusal(ATTENTION.backends[backend], *tensors, **options)):
        pytest.skip(f"{backend}: {no[1]}")


def with_gradients(backend, *tensors, **options):
    """out, dq, dk, dv, and dbias and dsinks where there are any; the gradient that comes back is
    laid out in yet another way."""
    able(backend, *tensors, **options)
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = attention(*leaves, **options, backend=backend)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype)
    cotangent = cotangent.view(out.shape[2], *out.shape[:2], out.shape[3]).permute(1, 2, 0, 3)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def near(ours, expected):
    """Both are sums of fewer than 200 terms below 8 in size, in another order."""
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 200 * 8 * torch.finfo(a.dtype).eps


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)
