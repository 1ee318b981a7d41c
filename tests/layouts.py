"""How an operand may lie in memory: the rows of no two lie equally far apart, so that a kernel must
not mix up their strides."""

import torch
from cases import as_list, leaves


def straight(t, place):
    return t


def strided(t, place):
    return torch.stack([t] * (place + 2), -1)[..., 0]


def sliced(t, place):
    return torch.nn.functional.pad(t, (0, 8 * (place + 1)))[..., : t.shape[-1]]


def misaligned(t, place):
    return torch.cat([t.flatten()[:1]] * (place + 1) + [t.flatten()])[place + 1 :].view(t.shape)


def ragged(t, place):
    return torch.nn.functional.pad(t, (0, 1))[..., : t.shape[-1]]


def laid_out(op, call, tensors, layout):
    """Outputs and gradients where each operand and what comes back is laid out by its place."""
    inputs = leaves(op, tensors)
    outs = as_list(call(*[t if t is None else layout(t, i) for i, t in enumerate(inputs)]))
    floating = [out for out in outs if out.requires_grad]
    if not floating:
        return outs
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in floating]
    cotangents = [layout(c, len(inputs) + i) if c.ndim else c for i, c in enumerate(cotangents)]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return [*outs, *torch.autograd.grad(floating, wanted, cotangents)]
