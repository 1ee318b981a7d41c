"""Packed sequences for the tests of attention, each tensor laid out in its own way."""

import pytest
import torch
from attention_cases import near
from cases import DEVICE

from tilewise import attention_varlen_with_lse
from tilewise.choice import refusal
from tilewise.op import OPS

INF, NAN = float("inf"), float("nan")
VARLEN = OPS["attention_varlen"]
EVERY = pytest.mark.parametrize("backend", [*VARLEN.backends, "reference"])
LENGTHS = ((3, 5), (0, 2), (7, 4), (2, 0), (20, 33))


def packed(lengths=LENGTHS, *, heads=4, kv_heads=2, dim=8, v_dim=6, past=0, dtype=torch.float32):
    """q, k, v, where the sequences end, and the longest, by name; each laid out in its own way."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    ends = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in (0, 1)]
    total_q, total_k = (int(e[-1]) + past for e in ends)
    q = normal(heads, total_q, dim).transpose(0, 1)
    k = normal(total_k, 3, kv_heads, dim)[:, 1]
    v = normal(total_k, kv_heads, v_dim + 5)[..., 5:]
    longest = [max((pair[i] for pair in lengths), default=0) for i in (0, 1)]
    return q, k, v, *(e.to(DEVICE) for e in ends), *longest


def able(backend, q, k, v, ends_q, ends_k, longest_q, longest_k, bias=None, sinks=None, **options):
    options |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    tensors = (q, k, v, ends_q, ends_k, bias, sinks)
    if backend != "reference" and (no := refusal(VARLEN.backends[backend], *tensors, **options)):
        pytest.skip(f"{backend}: {no[1]}")


def with_gradients(backend, *arguments, **options):
    """out, lse, and the gradients of q, k, v, of the bias and of the sinks where there are any."""
    able(backend, *arguments, **options)
    leaves = [
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]
    out, lse = attention_varlen_with_lse(*leaves, **options, backend=backend)
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    cotangent = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(out.dtype).view(out.shape)
    loss = (out * cotangent).sum() + lse.masked_fill(lse == -INF, 0).square().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


OPTIONS = {
    "plain": ((), {}),
    "causal": ((), {"causal": True}),
    "window": ((), {"window": (3, 1)}),
    "bias": ((randn(5, 1, 20, 33),), {}),
    "bias of heads": ((randn(1, 4, 20, 33),), {"causal": True}),
    "sinks": ((None, randn(4)), {"causal": True}),
    "slopes": ((), {"alibi_slopes": randn(4).abs(), "softcap": 2.0}),
    "slopes of each": ((), {"alibi_slopes": randn(5, 4).abs(), "scale": -0.4}),
    "all": ((randn(5, 4, 20, 33), randn(4)),
            {"alibi_slopes": randn(5, 4).abs(), "softcap": 2.0, "window": (9, 2), "causal": True}),
}  # fmt: skip


def same(ours, expected):
    near([t.nan_to_num(neginf=-99) for t in ours], [t.nan_to_num(neginf=-99) for t in expected])
