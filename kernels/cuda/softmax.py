"""Softmax in CUDA C++: a warp or a block per row, 16-byte accesses where the rows are aligned."""

from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def softmax_forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x [rows, cols] -> y [rows, cols], the softmax of scale * x, or its logarithm."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    _cuda.softmax_forward(
        address(y), address(x), rows, cols, x.stride(0), scale, log, DTYPES[x.dtype], stream(x)
    )
    return y


def softmax_backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """dy, y [rows, cols] -> dx [rows, cols]."""
    rows, cols = y.shape
    dx = y.new_empty(rows, cols)
    _cuda.softmax_backward(
        address(dx), address(dy), address(y),
        rows, cols, dy.stride(0), y.stride(0), scale, log, DTYPES[y.dtype], stream(y),
    )  # fmt: skip
    return dx
