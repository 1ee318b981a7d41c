"""Softmax and its logarithm over the last dimension."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def softmax(x: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """Exponentials of each row of `scale * x`, divided by their sum."""
    return softmax_reference(x, scale=scale)


def softmax_reference(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The formula of `softmax`, in plain PyTorch."""
    return torch.softmax(scale * x.to(wide_dtype(x.dtype)), -1).to(x.dtype)


def log_softmax(x: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """The logarithm of `softmax`."""
    return log_softmax_reference(x, scale=scale)


def log_softmax_reference(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The formula of `log_softmax`, in plain PyTorch."""
    return torch.log_softmax(scale * x.to(wide_dtype(x.dtype)), -1).to(x.dtype)
