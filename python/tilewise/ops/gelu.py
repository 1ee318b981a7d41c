"""Gaussian error linear unit (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415)."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """`x` times the normal distribution function of `x`, exact or by the tanh formula."""
    return gelu_reference(x, approximate)


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The formula of `gelu`, in plain PyTorch."""
    wide = x.to(wide_dtype(x.dtype))
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)
