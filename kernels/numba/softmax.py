"""Softmax and its logarithm on the CPU: parts of the rows in parallel, three passes over a row.

Scores that are more than `scale * x` are first written to a row of scratch, one loop an option.
"""

import math

import numpy as np
from torch import Tensor

from tilewise.kernels.numba import _lanes
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._shared import (
    PARTS,
    broadcast_strides,
    partial_sums,
    parts_for,
    wide_dtype,
)
from tilewise.kernels.numba._simd import (
    address,
    exp,
    kind,
    load,
    maximum,
    offset,
    pointer,
    real,
    store,
    tanh,
)
from tilewise.kernels.numba._stream import (
    CHUNK,
    finish_writes,
    highest,
    loop_of,
    streamed,
    sums_of,
    write,
)

FLAG = np.uint8(0)


_write_logs = loop_of(lambda x, factor, shift, less: (_lanes.fma(x, factor, shift) - less,))
_write_gradient = loop_of(lambda dy, y, factor, dot: (factor * y * (dy - dot),))
_write_log_gradient = loop_of(lambda dy, y, factor, sum: (factor * (dy - _lanes.exp(y) * sum),))


# --- Sums over a row: of chunks, which are added in fp64. One long chain, where vectors are short,
# is wrong by the root of its length.


def _power_twice(x, factor, peak):
    power = _lanes.exp(_lanes.fma(x, factor, -peak))
    return power, power


_sum_powers = sums_of(_power_twice, 1)
_sum_products = sums_of(lambda x, y: (x if y is None else x * y,), 1)


@callee
def _sum_of_powers(x, cols, factor, peak, powers):
    """The sum of exp(factor * x - peak), which are kept in `powers` unless that is None."""
    total = 0.0
    for start in range(0, cols, CHUNK):
        ins, outs = (offset(x, start),), (offset(powers, start),)
        (part,) = _sum_powers(outs, ins, (factor, peak), min(CHUNK, cols - start))
        total += part
    return real(x, total)


@callee
def _sum_of_products(x, y, cols):
    """The sum of x * y, of x alone where y is None."""
    total = 0.0
    for start in range(0, cols, CHUNK):
        ins = offset(x, start), offset(y, start)
        (part,) = _sum_products((), ins, (), min(CHUNK, cols - start))
        total += part
    return real(x, total)


# --- Of x alone.


@Kernel
def _forward(
    part, y_at, scratch_at, x_at,
    kind, wide, rows, cols, x_stride, parts, scale, in_place, past_caches,
):  # fmt: skip
    # y = exp(scale * x - peak) / total. The exponentials wait in scratch, one row a part, which is
    # y itself where that can hold them and is to stay in the caches.
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        powers = offset(pointer(scratch_at, wide), (i if in_place else part) * cols)

        peak = highest(x, factor, cols)
        inverse = real(kind, 1) / _sum_of_powers(x, cols, factor, peak, powers)
        y = offset(pointer(y_at, kind), i * cols)
        write((y,), (powers,), (inverse,), cols, past_caches)
    if past_caches:
        finish_writes()


@Kernel
def _log_forward(part, y_at, x_at, kind, rows, cols, x_stride, parts, scale, past_caches):
    # y = (scale * x - peak) - log(total): peak + log(total) would lose the logarithm in a large
    # peak.
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)

        peak = highest(x, factor, cols)
        log_total = real(kind, math.log(_sum_of_powers(x, cols, factor, peak, None)))
        _write_logs((y,), (x,), (factor, -peak, log_total), cols, past_caches)
    if past_caches:
        finish_writes()


@Kernel
def _backward(
    part, dx_at, dy_at, y_at, kind, rows, cols, dy_stride, y_stride, parts, scale, log,
    past_caches,
):  # fmt: skip
    # dx = scale * y * (dy - dot), with dot = sum(dy * y);
    # of the logarithm: dx = scale * (dy - exp(y) * total), with total = sum(dy)
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        y = offset(pointer(y_at, kind), i * y_stride)
        dx = offset(pointer(dx_at, kind), i * cols)

        if log:
            total = _sum_of_products(dy, None, cols)
            _write_log_gradient((dx,), (dy, y), (factor, total), cols, past_caches)
        else:
            total = _sum_of_products(dy, y, cols)
            _write_gradient((dx,), (dy, y), (factor, total), cols, past_caches)
    if past_caches:
        finish_writes()


# --- With softcap, bias, mask or causal limit.


@callee
def _start(strides, row, heads, queries):
    """Where in a [batch, heads, queries, cols] the row with this number begins, in elements."""
    head = row // queries
    batch = head // heads
    return batch * strides[0] + head % heads * strides[1] + row % queries * strides[2]


@callee
def _columns(row, cols, queries, causal):
    """How many columns this row sees, from the first."""
    seen = row % queries + cols - queries + 1 if causal else cols
    return min(max(seen, 0), cols)


@callee
def _hide(s, cols, mask_at, step, hidden):
    mask = pointer(mask_at, FLAG)
    for j in range(cols):
        store(s, j, load(s, j) if load(mask, j * step) else hidden)


@Kernel
def _scored_forward(
    part, y_at, scratch_at, x_at, bias_at, mask_at, kind, wide, bias_kind,
    rows, cols, x_stride, bias_strides, mask_strides, heads, queries, parts,
    scale, softcap, causal, zero, log, past_caches,
):  # fmt: skip
    factor, cap = real(kind, scale), real(kind, softcap)
    lowest, one = real(kind, -np.inf), real(kind, 1)
    s = offset(pointer(scratch_at, wide), part * cols)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)
        seen = _columns(i, cols, queries, causal)

        for j in range(seen):
            store(s, j, load(x, j) * factor)
        if softcap:
            for j in range(seen):
                store(s, j, cap * tanh(load(s, j) / cap))
        if bias_at:
            bias = offset(pointer(bias_at, bias_kind), _start(bias_strides, i, heads, queries))
            step = bias_strides[3]
            for j in range(seen):
                store(s, j, load(s, j) + real(kind, load(bias, j * step)))
        if mask_at:
            start = _start(mask_strides, i, heads, queries)
            _hide(s, seen, mask_at + start, mask_strides[3], lowest)

        peak = lowest
        for j in range(seen):
            peak = maximum(load(s, j), peak)
        if zero and peak == lowest:
            empty = lowest if log else real(kind, 0)
            for j in range(cols):
                store(y, j, empty)
            continue
        if log:
            log_total = real(kind, math.log(_sum_of_powers(s, seen, one, peak, None)))
            for j in range(seen):
                store(s, j, load(s, j) - peak - log_total)
            unseen = lowest - log_total  # NaN, where the row is
        else:
            inverse = one / _sum_of_powers(s, seen, one, peak, s)
            for j in range(seen):
                store(s, j, load(s, j) * inverse)
            unseen = real(kind, 0) * inverse
        for j in range(seen, cols):
            store(s, j, unseen)
        write((y,), (s,), (), cols, past_caches)
    if past_caches:
        finish_writes()


@callee
def _dscores(
    s, i, dy_at, y_at, mask_at, kind, cols, dy_stride, mask_strides, heads, queries,
    causal, zero, log,
):  # fmt: skip
    """Fill `s` with the gradient of the scores of row `i`; the number of columns it has one in."""
    dy, y = offset(pointer(dy_at, kind), i * dy_stride), offset(pointer(y_at, kind), i * cols)
    seen = _columns(i, cols, queries, causal)
    alive = True
    if log:
        total = _sum_of_products(dy, None, cols)
        if zero:
            peak = real(kind, -np.inf)
            for j in range(cols):
                peak = maximum(load(y, j), peak)
            alive = peak != real(kind, -np.inf)
        for j in range(seen):
            store(s, j, load(dy, j) - exp(load(y, j)) * total)
    else:
        total = _sum_of_products(dy, y, cols)
        for j in range(seen):
            store(s, j, load(y, j) * (load(dy, j) - total))
    if not alive:
        return 0
    if mask_at:
        start = _start(mask_strides, i, heads, queries)
        _hide(s, seen, mask_at + start, mask_strides[3], real(kind, 0))
    return seen


@Kernel
def _scored_backward(
    part, dx_at, scratch_at, dy_at, y_at, x_at, mask_at, kind, wide,
    rows, cols, dy_stride, x_stride, mask_strides, heads, queries, parts,
    scale, softcap, causal, zero, log, past_caches,
):  # fmt: skip
    factor, cap = real(kind, scale), real(kind, softcap)
    s = offset(pointer(scratch_at, wide), part * cols)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        dx = offset(pointer(dx_at, kind), i * cols)
        seen = _dscores(
            s, i, dy_at, y_at, mask_at, kind, cols, dy_stride, mask_strides, heads, queries,
            causal, zero, log,
        )  # fmt: skip
        if softcap:
            x = offset(pointer(x_at, kind), i * x_stride)
            for j in range(seen):
                t, ds = tanh(load(x, j) * factor / cap), load(s, j)
                ds = ds if ds == real(kind, 0) else ds * (real(kind, 1) - t * t)
                store(s, j, ds)  # 0, whatever lies under the mask
        for j in range(seen, cols):
            store(s, j, real(kind, 0))
        write((dx,), (s,), (factor,), cols, past_caches)
    if past_caches:
        finish_writes()


@Kernel
def _bias_backward(
    part, sums_at, scratch_at, dy_at, y_at, mask_at, kind, wide,
    cols, dy_stride, sum_stride, mask_strides, heads, queries, bias_sizes, copies, parts,
    causal, zero, log,
):  # fmt: skip
    # Row b of the bias has this part of the sum over all rows it was added to: its batches, heads
    # and queries where its own size is 1.
    b, piece = part // parts, part % parts
    _, bias_heads, bias_queries = bias_sizes
    head_copies = heads if bias_heads == 1 else 1
    query_copies = queries if bias_queries == 1 else 1
    first_query, head = b % bias_queries, b // bias_queries
    first_head, first_batch = head % bias_heads, head // bias_heads
    sums = offset(pointer(sums_at, wide), part * sum_stride)
    s = offset(pointer(scratch_at, wide), part * cols)
    for c in range(piece * copies // parts, (piece + 1) * copies // parts):
        query = first_query + c % query_copies
        head = first_head + c // query_copies % head_copies
        batch = first_batch + c // query_copies // head_copies
        seen = _dscores(
            s, (batch * heads + head) * queries + query, dy_at, y_at, mask_at, kind,
            cols, dy_stride, mask_strides, heads, queries, causal, zero, log,
        )  # fmt: skip
        for j in range(seen):
            store(sums, j, load(sums, j) + load(s, j))


def softmax_forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x [rows, cols] -> y [rows, cols], probabilities or their logarithms."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    parts = parts_for(rows)
    sizes = (rows, cols, x.stride(0), parts, scale)
    past_caches = streamed(y)
    if log:
        _log_forward(parts, x.numel(), address(y), address(x), kind(x), *sizes, past_caches)
        return y
    wide = wide_dtype(x.dtype)
    in_place = wide == x.dtype and not past_caches
    powers = y if in_place else x.new_empty(parts, cols, dtype=wide)
    _forward(
        parts, x.numel(), address(y), address(powers), address(x),
        kind(x), kind(powers), *sizes, in_place, past_caches,
    )  # fmt: skip
    return y


def softmax_backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """dy, y [rows, cols] -> dx [rows, cols]."""
    rows, cols = y.shape
    dx = y.new_empty(rows, cols)
    parts = parts_for(rows)
    _backward(
        parts, 2 * y.numel(), address(dx), address(dy), address(y),
        kind(y), rows, cols, dy.stride(0), y.stride(0), parts, scale, log, streamed(dx),
    )  # fmt: skip
    return dx


def scored_softmax_forward(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, queries: int,
    scale: float, softcap: float, causal: bool, zero: bool, log: bool,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias, mask [batch | 1, heads | 1, queries | 1, cols] -> y [rows, cols]."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    parts = parts_for(rows)
    scores = x.new_empty(parts, cols, dtype=wide_dtype(x.dtype))
    _scored_forward(
        parts, x.numel(), address(y), address(scores), address(x), address(bias), address(mask),
        kind(x), kind(scores), kind(x if bias is None else bias),
        rows, cols, x.stride(0), broadcast_strides(bias), broadcast_strides(mask),
        heads, queries, parts, scale, softcap, causal, zero, log, streamed(y),
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
    parts = parts_for(rows)
    wide = wide_dtype(y.dtype)
    scores = y.new_empty(parts, cols, dtype=wide)
    _scored_backward(
        parts, 2 * y.numel(), address(dx), address(scores), address(dy), address(y),
        address(x), address(mask), kind(y), kind(scores),
        rows, cols, dy.stride(0), 0 if x is None else x.stride(0), broadcast_strides(mask),
        heads, queries, parts, scale, softcap, causal, zero, log, streamed(dx),
    )  # fmt: skip
    if not want_dbias:
        return dx, y.new_empty(0)

    assert bias is not None
    lines = bias.shape[:-1].numel()
    copies = rows // lines
    parts = min(copies, -(-PARTS // lines))
    sums = partial_sums(y, lines * parts, wide)
    scores = y.new_empty(lines * parts, cols, dtype=wide)
    _bias_backward(
        lines * parts, 2 * y.numel(), address(sums), address(scores), address(dy), address(y),
        address(mask), kind(y), kind(scores),
        cols, dy.stride(0), sums.shape[1], broadcast_strides(mask), heads, queries,
        tuple(bias.shape[:-1]), copies, parts, causal, zero, log,
    )  # fmt: skip
    dbias = sums.view(lines, parts, -1).sum(1)[:, :cols]
    return dx, dbias.to(bias.dtype).contiguous().view(bias.shape)
