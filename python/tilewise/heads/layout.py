"""How tensors of heads lie, and what they are turned into on the way to a kernel and back."""

import math

import torch
from torch import Tensor


def same_layout(x: Tensor, cols: int) -> Tensor:
    """What the kernels allocate: the dims in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def in_rows(t: Tensor) -> Tensor:
    """Any strides, but each row in one piece."""
    return t if t.stride(-1) == 1 else t.contiguous()


def lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of a tensor: fp64 and integers stay."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def lse_of(highest: Tensor, total: Tensor) -> Tensor:
    """The natural logarithm of the sum that a row's statistics stand for."""
    return torch.add(total.log(), highest, alpha=math.log(2))  # in one rounding
