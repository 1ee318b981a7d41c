"""Gated linear units (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.op import wide_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def glu(
    gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str | None = None
) -> Tensor:
    """The activation of `gate`, times `up`: SwiGLU with "silu"."""
    return glu_reference(gate, up, activation)


def glu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The formula of `glu`, in plain PyTorch."""
    wide = wide_dtype(gate.dtype)
    return (_ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)
