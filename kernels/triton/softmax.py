"""Softmax and its logarithm on the GPU: a program takes a tile of narrow rows, or one row, and that
in blocks where it is wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import tanh
from tilewise.kernels.triton._scores import columns_seen, read, row_start, scores, shown
from tilewise.kernels.triton._shared import (
    MAX_PARTS,
    WIDE_ROW,
    WIDEST_BLOCK,
    broadcast_strides,
    launch_options,
    row_options,
)
from tilewise.kernels.triton._shared import SEARCH_SPACE as SEARCH_SPACE

WIDE_TILE = {"ROWS": 1, **WIDE_ROW}
NARROW_ROW = 512  # columns; of narrower rows a program takes as many as fill
TILE = 1024  # elements, eight a lane
WIDEST_DBIAS = 1024  # columns of a bias that a program adds up,
COPIES = 8  # over at least so many rows


def tile_options(cols: int) -> dict[str, int]:
    """A row in one block, and where it is narrow a tile of them."""
    options = row_options(cols)
    if cols > NARROW_ROW:
        return {"ROWS": 1, **options}
    return {**options, "ROWS": TILE // options["BLOCK"], **launch_options(4)}


@triton.jit
def _forward_kernel(
    y_ptr, x_ptr, bias_ptr, mask_ptr,
    rows, cols, x_stride, heads, queries,
    bias_batch, bias_head, bias_query, bias_col, mask_batch, mask_head, mask_query, mask_col,
    scale, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ZERO: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    bias_starts = row_start(row, heads, queries, bias_batch, bias_head, bias_query)
    mask_starts = row_start(row, heads, queries, mask_batch, mask_head, mask_query)
    s = scores(
        x_ptr, bias_ptr, mask_ptr, row, col, bias_starts, mask_starts, rows, cols, queries,
        x_stride, bias_col, mask_col, scale, softcap, SOFTCAP, BIAS, MASK, CAUSAL,
    )  # fmt: skip

    peak = tl.max(s, axis=1, keep_dims=True)
    s -= peak
    e = tl.exp(s)
    total = tl.sum(e, axis=1, keep_dims=True)
    y = s - tl.log(total) if LOG else e / total
    if ZERO:
        y = tl.where(peak == float("-inf"), float("-inf") if LOG else 0.0, y)

    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(y_ptr + (row * cols)[:, None] + col[None, :], y, mask=inside)


@triton.jit
def _forward_wide_kernel(
    y_ptr, x_ptr, bias_ptr, mask_ptr,
    rows, cols, x_stride, heads, queries,
    bias_batch, bias_head, bias_query, bias_col, mask_batch, mask_head, mask_query, mask_col,
    scale, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ZERO: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    bias_starts = row_start(row, heads, queries, bias_batch, bias_head, bias_query)
    mask_starts = row_start(row, heads, queries, mask_batch, mask_head, mask_query)
    peak = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    last = tl.max(columns_seen(row, cols, queries)) if CAUSAL else cols
    for start in range(0, last, BLOCK):
        col = start + tl.arange(0, BLOCK)
        s = scores(
            x_ptr, bias_ptr, mask_ptr, row, col, bias_starts, mask_starts, rows, cols, queries,
            x_stride, bias_col, mask_col, scale, softcap, SOFTCAP, BIAS, MASK, CAUSAL,
        )  # fmt: skip
        before, peak = peak, tl.maximum(peak, tl.max(s, axis=1, keep_dims=True))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf would be NaN
        total = total * tl.exp(before - shift)
        total += tl.sum(tl.exp(s - shift), axis=1, keep_dims=True)

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        s = scores(
            x_ptr, bias_ptr, mask_ptr, row, col, bias_starts, mask_starts, rows, cols, queries,
            x_stride, bias_col, mask_col, scale, softcap, SOFTCAP, BIAS, MASK, CAUSAL,
        )  # fmt: skip
        s -= peak
        y = s - tl.log(total) if LOG else tl.exp(s) / total
        if ZERO:
            y = tl.where(peak == float("-inf"), float("-inf") if LOG else 0.0, y)
        place = (row * cols)[:, None] + col[None, :]
        tl.store(y_ptr + place, y, mask=(col < cols)[None, :])


@triton.jit
def _dx(
    dy, y, total, alive, x_ptr, mask_ptr, row, col, readable, mask_starts,
    cols, queries, x_stride, mask_col, scale, softcap,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """ds = y * (dy - sum(dy * y)), or dy - exp(y) * sum(dy) for the logarithm; dx from it."""
    ds = scale * (dy - tl.exp(y) * total) if LOG else scale * y * (dy - total)
    if LOG and ZERO:
        ds = tl.where(alive, ds, 0.0)
    ds = shown(
        ds, 0.0, mask_ptr, mask_starts, mask_col, row, col, readable, cols, queries, MASK, CAUSAL
    )  # fmt: skip
    if SOFTCAP:
        t = tanh(scale * read(x_ptr, row, col, x_stride, readable, 0.0) / softcap)
        ds = tl.where(ds == 0.0, 0.0, ds * (1.0 - t * t))  # whatever x lies under the mask
    return ds


@triton.jit
def _backward_kernel(
    dx_ptr, totals_ptr, seen_ptr, dy_ptr, y_ptr, x_ptr, mask_ptr,
    rows, cols, dy_stride, y_stride, x_stride, heads, queries,
    mask_batch, mask_head, mask_query, mask_col, scale, softcap,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    LOG: tl.constexpr, DBIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    dy = read(dy_ptr, row, col, dy_stride, inside, 0.0)
    y = read(y_ptr, row, col, y_stride, inside, float("-inf") if LOG else 0.0)

    total = tl.sum(dy if LOG else dy * y, axis=1, keep_dims=True)
    alive = tl.max(y, axis=1, keep_dims=True) != float("-inf")
    mask_starts = row_start(row, heads, queries, mask_batch, mask_head, mask_query)
    dx = _dx(
        dy, y, total, alive, x_ptr, mask_ptr, row, col, inside, mask_starts, cols, queries,
        x_stride, mask_col, scale, softcap, SOFTCAP, MASK, CAUSAL, ZERO, LOG,
    )  # fmt: skip

    if DBIAS:
        _store_row(
            totals_ptr, seen_ptr, total, alive, row, rows, cols, queries, CAUSAL, LOG and ZERO
        )
    tl.store(dx_ptr + (row * cols)[:, None] + col[None, :], dx, mask=inside)


@triton.jit
def _backward_wide_kernel(
    dx_ptr, totals_ptr, seen_ptr, dy_ptr, y_ptr, x_ptr, mask_ptr,
    rows, cols, dy_stride, y_stride, x_stride, heads, queries,
    mask_batch, mask_head, mask_query, mask_col, scale, softcap,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    LOG: tl.constexpr, DBIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    peak = tl.full([ROWS, 1], float("-inf"), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        dy = read(dy_ptr, row, col, dy_stride, inside, 0.0)
        if not LOG:
            dy *= read(y_ptr, row, col, y_stride, inside, 0.0)
        sums += dy
        if LOG and ZERO:
            y = read(y_ptr, row, col, y_stride, inside, float("-inf"))
            peak = tl.maximum(peak, tl.max(y, axis=1, keep_dims=True))
    total = tl.sum(sums, axis=1, keep_dims=True)
    alive = peak != float("-inf")
    if DBIAS:
        _store_row(
            totals_ptr, seen_ptr, total, alive, row, rows, cols, queries, CAUSAL, LOG and ZERO
        )  # fmt: skip

    mask_starts = row_start(row, heads, queries, mask_batch, mask_head, mask_query)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        dx = _dx(
            read(dy_ptr, row, col, dy_stride, inside, 0.0),
            read(y_ptr, row, col, y_stride, inside, 0.0),
            total, alive, x_ptr, mask_ptr, row, col, inside, mask_starts, cols, queries,
            x_stride, mask_col, scale, softcap, SOFTCAP, MASK, CAUSAL, ZERO, LOG,
        )  # fmt: skip
        tl.store(dx_ptr + (row * cols)[:, None] + col[None, :], dx, mask=inside)


@triton.jit
def _store_row(
    totals_ptr, seen_ptr, total, alive, row, rows, cols, queries,
    CAUSAL: tl.constexpr, ALIVE: tl.constexpr,
):  # fmt: skip
    """What the gradient of a bias needs of each row: its sum, and how many columns have one."""
    seen = columns_seen(row, cols, queries) if CAUSAL else row.to(tl.int32) * 0 + cols
    if ALIVE:
        seen = tl.where(tl.max(alive.to(tl.int32), axis=1) != 0, seen, 0)
    tl.store(totals_ptr + row, tl.sum(total, axis=1), mask=row < rows)
    tl.store(seen_ptr + row, seen, mask=row < rows)


@triton.jit
def _dbias_kernel(
    sums_ptr, dy_ptr, y_ptr, mask_ptr, totals_ptr, seen_ptr,
    cols, dy_stride, y_stride, heads, queries, bias_heads, bias_queries, copies, parts,
    mask_batch, mask_head, mask_query, mask_col,
    MASK: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A line of the bias was added to `copies` rows: all batches, heads and queries where its own
    # size is 1. Each program adds up one of `parts` parts of them.
    line = tl.program_id(0) // parts
    part = tl.cast(tl.program_id(0) % parts, tl.int64)
    head_copies = tl.where(bias_heads == 1, heads, 1)
    query_copies = tl.where(bias_queries == 1, queries, 1)
    first_query = line % bias_queries
    first_head = line // bias_queries % bias_heads
    first_batch = tl.cast(line // bias_queries // bias_heads, tl.int64)

    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(part * copies // parts, (part + 1) * copies // parts):
        query = first_query + i % query_copies
        head = first_head + i // query_copies % head_copies
        row = ((first_batch + i // query_copies // head_copies) * heads + head) * queries + query
        inside = col < tl.load(seen_ptr + row)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_stride + col, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(totals_ptr + row)
        ds = dy - tl.exp(y) * total if LOG else y * (dy - total)
        if MASK:
            start = row_start(row, heads, queries, mask_batch, mask_head, mask_query)
            inside &= tl.load(mask_ptr + start + col * mask_col, mask=inside, other=0) != 0
        sums += tl.where(inside, ds, 0.0)
    tl.store(sums_ptr + tl.program_id(0) * cols + col, sums, mask=col < cols)


def softmax_forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x [rows, cols] -> y [rows, cols], probabilities or their logarithms."""
    return scored_softmax_forward(x, None, None, 1, 1, scale, 0.0, False, False, log)


def softmax_backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """dy, y [rows, cols] -> dx [rows, cols]."""
    options = (1, 1, scale, 0.0, False, False, log, False)
    return scored_softmax_backward(dy, y, None, None, None, *options)[0]


def scored_softmax_forward(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, queries: int,
    scale: float, softcap: float, causal: bool, zero: bool, log: bool,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias, mask [batch | 1, heads | 1, queries | 1, cols] -> y [rows, cols]."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    kernel, options = (
        (_forward_wide_kernel, WIDE_TILE)
        if cols > WIDEST_BLOCK
        else (_forward_kernel, tile_options(cols))
    )
    flags, mask_strides = _flags(mask, x)
    kernel[(triton.cdiv(rows, options["ROWS"]),)](
        y, x, x if bias is None else bias, flags,
        rows, cols, x.stride(0), heads, queries, *broadcast_strides(bias), *mask_strides,
        scale, softcap, SOFTCAP=softcap > 0, BIAS=bias is not None,
        MASK=mask is not None, CAUSAL=causal, ZERO=zero, LOG=log, **options,
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
    kernel, options = (
        (_backward_wide_kernel, WIDE_TILE)
        if cols > WIDEST_BLOCK
        else (_backward_kernel, tile_options(cols))
    )
    flags, mask_strides = _flags(mask, y)
    given = y if x is None else x
    totals = y.new_empty(rows if want_dbias else 0, dtype=torch.float32)
    seen = y.new_empty(rows if want_dbias else 0, dtype=torch.int32)
    kernel[(triton.cdiv(rows, options["ROWS"]),)](
        dx, totals, seen, dy, y, given, flags,
        rows, cols, dy.stride(0), y.stride(0), given.stride(0), heads, queries, *mask_strides,
        scale, softcap, SOFTCAP=softcap > 0, MASK=mask is not None, CAUSAL=causal,
        ZERO=zero, LOG=log, DBIAS=want_dbias, **options,
    )  # fmt: skip
    if not want_dbias:
        return dx, y.new_empty(0)

    assert bias is not None
    lines = bias.shape[:-1].numel()
    copies = rows // lines
    parts = min(triton.cdiv(copies, COPIES), triton.cdiv(MAX_PARTS, lines))
    sums = y.new_empty(lines * parts, cols, dtype=torch.float32)
    block = min(triton.next_power_of_2(cols), WIDEST_DBIAS)
    _dbias_kernel[(lines * parts, triton.cdiv(cols, block))](
        sums, dy, y, flags, totals, seen,
        cols, dy.stride(0), y.stride(0), heads, queries, *bias.shape[1:3], copies, parts,
        *mask_strides, MASK=mask is not None, LOG=log, BLOCK=block,
        **launch_options(max(block // 512, 1)),
    )  # fmt: skip
    return dx, sums.view(lines, parts, cols).sum(1).view(bias.shape).to(bias.dtype)


def _flags(mask: Tensor | None, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The mask as bytes, which a load can take, and its strides."""
    return (x if mask is None else mask.view(torch.uint8)), broadcast_strides(mask)
