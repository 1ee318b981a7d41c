"""GELU in CUDA C++: one access a thread, of 16 bytes where the rows are aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, draw, stream

PART_ELEMENTS = 2**19  # the shorter the rows, the more parts they are shared out to
MIN_PARTS = 256


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x [rows, cols] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    _cuda.gelu_forward(
        address(y), address(x), *x.shape, x.stride(0), approximate == "tanh",
        DTYPES[x.dtype], stream(x),
    )  # fmt: skip
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy, x [rows, cols] -> dx [rows, cols]."""
    dx = x.new_empty(x.shape)
    _cuda.gelu_backward(
        address(dx), address(dy), address(x), *x.shape, dy.stride(0), x.stride(0),
        approximate == "tanh", DTYPES[x.dtype], stream(x),
    )  # fmt: skip
    return dx


def bias_gelu_forward(
    x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias [cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    _cuda.bias_gelu_forward(
        address(y), address(x), address(bias), *x.shape, x.stride(0), approximate == "tanh",
        *draw(dropout_p, seeds, offsets, seed, offset),
        DTYPES[x.dtype], DTYPES[bias.dtype], stream(x),
    )  # fmt: skip
    return y


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    want_dx: bool, want_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, x [rows, cols], bias [cols] -> dx [rows, cols], dbias [cols], or empty if not wanted."""
    rows, cols = x.shape
    parts = min(rows, max(MIN_PARTS, PART_ELEMENTS // cols))
    dx = x.new_empty(x.shape) if want_dx else None
    sums = x.new_empty(parts, cols, dtype=torch.float32) if want_dbias else None
    dbias = bias.new_empty(cols) if want_dbias else None
    _cuda.bias_gelu_backward(
        address(dx), address(dbias), address(sums), address(dy), address(x), address(bias),
        rows, cols, dy.stride(0), x.stride(0), parts, approximate == "tanh",
        *draw(dropout_p, seeds, offsets, seed, offset),
        DTYPES[x.dtype], DTYPES[bias.dtype], stream(x),
    )  # fmt: skip
    none = x.new_empty(0)
    return none if dx is None else dx, bias.new_empty(0) if dbias is None else dbias
