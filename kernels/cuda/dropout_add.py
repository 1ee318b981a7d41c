"""Dropout and a residual in CUDA C++: one access a thread, of 16 bytes where rows are aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, draw, stream


def _launch(
    y: Tensor, x: Tensor, residual: Tensor | None,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    _cuda.dropout_add_forward(
        address(y), address(x), address(residual), *x.shape,
        x.stride(0), 0 if residual is None else residual.stride(0),
        *draw(p, seeds, offsets, seed, offset), DTYPES[x.dtype], DTYPES[y.dtype], stream(x),
    )  # fmt: skip
    return y


def dropout_add_forward(
    x: Tensor, residual: Tensor,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x, residual [rows, cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = residual.new_empty(x.shape)
    return _launch(y, x, residual, p, seeds, offsets, seed, offset)


def dropout_add_backward(
    dy: Tensor, p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dy [rows, cols], seeds and offsets [] or [rows] -> dx [rows, cols]."""
    dx = dy.new_empty(dy.shape, dtype=dtype)
    return _launch(dx, dy, None, p, seeds, offsets, seed, offset)
