"""Softmax in CUDA C++: a warp or a block per row, 16-byte accesses where the rows are aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, MIN_PARTS, address, broadcast_strides, stream

COPIES = 8  # rows that a part of a bias's gradient is the sum of, at least


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


def scored_softmax_forward(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, queries: int,
    scale: float, softcap: float, causal: bool, zero: bool, log: bool,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias, mask [batch | 1, heads | 1, queries | 1, cols] -> y [rows, cols]."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    _cuda.scored_softmax_forward(
        address(y), address(x), address(bias), address(mask),
        rows, cols, heads, queries, x.stride(0),
        *broadcast_strides(bias), *broadcast_strides(mask), scale, softcap, causal, zero, log,
        DTYPES[x.dtype], DTYPES[(x if bias is None else bias).dtype], stream(x),
    )  # fmt: skip
    return y


def scored_softmax_backward(
    dy: Tensor, y: Tensor, x: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    heads: int, queries: int, scale: float, softcap: float, causal: bool, zero: bool,
    log: bool, want_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, y [rows, cols], x the same if softcap, bias, mask [batch | 1, heads | 1, queries | 1,
    cols] -> dx [rows, cols], dbias like bias, or [0]."""
    rows, cols = y.shape
    dx = y.new_empty(rows, cols)
    totals = y.new_empty(rows, dtype=torch.float32) if want_dbias else None
    seen = y.new_empty(rows, dtype=torch.int32) if want_dbias else None
    _cuda.scored_softmax_backward(
        address(dx), address(totals), address(seen),
        address(dy), address(y), address(x), address(mask),
        rows, cols, heads, queries, dy.stride(0), y.stride(0), 0 if x is None else x.stride(0),
        *broadcast_strides(mask), scale, softcap, causal, zero, log, DTYPES[y.dtype], stream(y),
    )  # fmt: skip
    if not want_dbias:
        return dx, y.new_empty(0)

    assert bias is not None
    lines = bias.shape[:-1].numel()
    copies = rows // lines
    parts = min(-(-copies // COPIES), -(-MIN_PARTS // lines))
    sums = y.new_empty(lines, parts, cols, dtype=torch.float32)
    _cuda.scored_softmax_dbias(
        address(sums), address(dy), address(y), address(totals), address(seen), address(mask),
        lines, cols, heads, queries, bias.shape[1], bias.shape[2], copies, parts,
        dy.stride(0), y.stride(0), *broadcast_strides(mask), causal, log,
        DTYPES[y.dtype], stream(y),
    )  # fmt: skip
    return dx, sums.sum(1).view(bias.shape).to(bias.dtype)
