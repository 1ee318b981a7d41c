"""Attention of a few new queries to a cache of keys: every key and value is read once, straight
from where it lies, for all the queries that share it.

Keys are split by their positions alone, so that no bit depends on the threads, on the rest of the
batch or on how much room a cache has. A split leaves a sum, unnormalised, and its statistics; the
splits of a row are put together in their order.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import exp, fma, tanh, where
from tilewise.kernels.numba._matmul import lanes, once
from tilewise.kernels.numba._parallel import INT64, Kernel, callee
from tilewise.kernels.numba._row_products import (
    KEYS,
    ROWS,
    element,
    multiply_keys,
    weigh_values,
)
from tilewise.kernels.numba._simd import load, offset, pointer, real, store
from tilewise.kernels.numba._stream import highest, loop_of, scratch_of, sums_of

SPLIT = np.int64(512)  # keys of one item
NUMBER = np.int32(0)

# Bytes asked for before they are read: a third of the L1 cache. A head's keys and values
# then came at 25 GB/s from memory, where torch's sum read 38, and without asking at 20 (one thread,
# 32/8 heads of 128, fp32, 16384 keys; 37 and 30 of 48 with 4096; AMD Zen 5, shared, 2026-11).
NEAR = np.int64(1 << 14)
BEYOND = KEYS + ROWS  # addresses after those of the values, to ask for

_scores = scratch_of(ROWS * KEYS)
_line = scratch_of(KEYS)
_few = scratch_of(ROWS)


def step_of(rows: int, lanes: int) -> int:
    """How many queries meet a key at once."""
    return rows if rows < 3 else min(4, lanes)


def work_of(rows: int, width: int, v_width: int) -> int:
    """Elements of an item: queries, sums, their highest scores and totals, and a row of zeros."""
    return rows * (width + v_width + 2) + max(width, v_width)


_work_of = callee(work_of)


@intrinsic
def _addresses(typing_context):
    """Memory for the addresses of KEYS keys, as many values, and what follows."""

    def emit(context, builder, signature, args):
        slot = cgutils.alloca_once(builder, ir.ArrayType(INT64, int(2 * KEYS + BEYOND)))
        return builder.bitcast(slot, INT64.as_pointer())

    return types.CPointer(types.int64)(), emit


# --- What becomes of a line of scores: one query, its keys on the lanes.


def _capped(x, scale, cap):
    return (cap * tanh(x * scale),)


def _placed(x, place, scale, start, slope, left):
    d = place + start
    x = x * scale - slope * abs(d)
    return (where(d < -left, float("-inf"), where(d > 0.0, float("-inf"), x)),)


def _power(x, scale, base):
    p = exp(fma(x, scale, -base))
    return p, p


_cap, _place, _powers = loop_of(_capped), loop_of(_placed), sums_of(_power, 1)


@callee
def _soften(line, places, keys_at, zeros_at, missing, keys, first, own, slope, rules, stats, r):
    """Turn the products of a query into probabilities above its highest score, and bring up to date
    its statistics: the highest, the sum, and by what sums are to be rescaled."""
    once()
    top, total, rescale = stats
    scale, cap, left = rules
    factor, none = real(line, scale), real(line, -math.inf)
    if cap > 0:
        _cap((line,), (line,), (real(line, scale / cap), real(line, cap)), keys, False)
        factor = real(line, 1)
    hidden = own < first + keys - 1 or (left >= 0 and first < own - left)
    if hidden or missing or slope != 0:
        reach = real(line, left if left >= 0 else math.inf)
        numbers = (factor, real(line, first - own), slope, reach)
        _place((line,), (line, places), numbers, keys, False)
        factor = real(line, 1)
    if missing:
        for j in range(keys):
            if load(keys_at, j) == zeros_at:
                store(line, j, none)
    before = load(top, r)
    now = max(highest(line, factor, keys), before)
    base = now if now != none else real(line, 0)
    (found,) = _powers((line,), (line,), (factor, base), keys)
    scaled = real(line, math.exp(np.float64(before) - np.float64(base)))
    store(rescale, r, scaled)
    store(total, r, load(total, r) * scaled + found)
    store(top, r, now)


# --- One split of the keys of one head.


@callee
def _locate(keys_at, values_at, zeros_at, cache, kv, batch, head, first, keys):
    """Addresses of keys `first` and on and of their values: the row of zeros where there is no
    page, behind the last key the last again, and behind the last value the keys that would follow
    in one piece, which are only asked for. Returns whether any page is missing."""
    once()
    k_at, v_at, k_strides, v_strides, size_of_kind = kv
    table_at, table_stride, page_size, pages, _ = cache
    done, missing = 0, 0
    while done < keys:
        position = first + done
        page, slot = batch, position
        if table_at:
            row = pointer(table_at, NUMBER)
            page = np.int64(load(row, batch * table_stride + position // page_size))
            slot = position % page_size
        run = min(page_size - slot, keys - done)
        k, k_step, v, v_step = zeros_at, 0, zeros_at, 0
        if page >= 0 and page < pages:
            k_step, v_step = k_strides[2] * size_of_kind, v_strides[2] * size_of_kind
            k = k_at + (page * k_strides[0] + head * k_strides[1]) * size_of_kind + slot * k_step
            v = v_at + (page * v_strides[0] + head * v_strides[1]) * size_of_kind + slot * v_step
        else:
            missing = 1
        for j in range(run):
            store(keys_at, done + j, k + j * k_step)
            store(values_at, done + j, v + j * v_step)
        done += run
    for j in range(KEYS - keys):
        store(keys_at, keys + j, load(keys_at, keys - 1))
    for j in range(BEYOND):
        store(values_at, keys + j, load(keys_at, keys - 1) + (1 + j) * k_strides[2] * size_of_kind)
    return missing


@callee
def _read_rows(q, source, strides, group, seq_q, rows, width, dim):
    """The queries that share a head, padded to a whole number of vectors."""
    once()
    step = lanes(q)
    whole = dim // step * step if dim >= step else dim
    for r in range(rows):
        y = offset(q, r * width)
        for d in range(width):
            store(y, d, real(q, 0))
        if r < group * seq_q:
            x = offset(source, r // seq_q * strides[1] + r % seq_q * strides[2])
            for d in range(whole):
                store(y, d, load(x, d))
            for d in range(dim - whole):  # at the end of the last vector, which ends with the row
                store(y, whole + step - (dim - whole) + d, load(x, whole + d))


@callee
def _near(size):
    """How many rows of this many bytes are asked for ahead."""
    return min(max(NEAR // size // 16 * 16, 16), KEYS)


@callee
def length_of(lengths_at, batch, capacity):
    """How many keys a sequence has in its cache."""
    return min(max(np.int64(load(pointer(lengths_at, NUMBER), batch)), np.int64(0)), capacity)


@callee
def first_split(length, seq_q, left):
    """The first split of which any query sees a key."""
    return max(length - seq_q - left, 0) // SPLIT if left >= 0 else 0


@callee
def _spaces(work_at, item, wide, size_of_wide, rows, width, v_width):
    """What an item leaves, sums and statistics, and before them its queries and a row of zeros."""
    size = _work_of(rows, width, v_width)
    q = offset(pointer(work_at, wide), item * size)
    sums = offset(q, rows * width)
    top = offset(sums, rows * v_width)
    total = offset(top, rows)
    zeros_at = work_at + (item * size + rows * (width + v_width + 2)) * size_of_wide
    return q, sums, top, total, zeros_at


@Kernel
def attend_split(item, work_at, ins, kinds, sizes, strides, cache, rules):
    # An item is a split of the keys of one head, for all queries of the heads that share it: row r
    # is query r % seq_q of head r // seq_q of these. Strides are of [batch, heads, seq_q] of q, and
    # of [batch or page, head, position] of k and v.
    q_at, k_at, v_at, lengths_at, slopes_at = ins
    kind, wide, size_of_kind, size_of_wide = kinds
    heads, kv_heads, seq_q, dim, v_dim, splits, rows, step, width, v_width, capacity = sizes
    q_strides, k_strides, v_strides, slope_strides = strides
    left = rules[2]
    unit, split = item // splits, item % splits
    batch, head, group = unit // kv_heads, unit % kv_heads, heads // kv_heads
    length = length_of(lengths_at, batch, capacity)
    begin, end = split * SPLIT, min((split + 1) * SPLIT, length)
    if left >= 0:
        begin = max(begin, length - seq_q - left)
    if begin >= end:
        return
    q, sums, top, total, zeros_at = _spaces(work_at, item, wide, size_of_wide, rows, width, v_width)
    source = offset(pointer(q_at, kind), batch * q_strides[0] + head * group * q_strides[1])
    _read_rows(q, source, q_strides, group, seq_q, rows, width, dim)
    for i in range(rows * v_width):
        store(sums, i, real(wide, 0))
    for i in range(rows):
        store(top, i, real(wide, -math.inf))
        store(total, i, real(wide, 0))
    zeros = pointer(zeros_at, wide)
    for i in range(max(width, v_width)):
        store(zeros, i, real(wide, 0))
    s, places, rescale, ones = _scores(q), _line(q), _few(q), _few(q)
    for j in range(KEYS):
        store(places, j, real(wide, j))
    for i in range(ROWS):
        store(rescale, i, real(wide, 1))
        store(ones, i, real(wide, 1))
    near, v_near = _near(dim * size_of_kind), _near(v_dim * size_of_kind)
    keys_at = _addresses()
    values_at = offset(keys_at, KEYS)
    kv = (k_at, v_at, k_strides, v_strides, size_of_kind)
    slopes = pointer(slopes_at, np.float32(0))
    for first in range(begin, end, KEYS):
        keys = min(KEYS, end - first)
        missing = _locate(keys_at, values_at, zeros_at, cache, kv, batch, head, first, keys)
        for row in range(0, rows, ROWS):
            some = min(ROWS, rows - row)
            own_q, own_sums = offset(q, row * width), offset(sums, row * v_width)
            multiply_keys(s, own_q, width, keys_at, kind, some, step, keys, dim, near)
            for r in range(min(some, group * seq_q - row)):
                shared = (row + r) // seq_q
                slope = real(wide, 0)
                if slopes_at:
                    place = batch * slope_strides[0] + (head * group + shared) * slope_strides[1]
                    slope = real(wide, load(slopes, place))
                _soften(
                    offset(s, r * KEYS), places, keys_at, zeros_at, missing, keys, first,
                    length - seq_q + (row + r) % seq_q, slope, rules,
                    (offset(top, row), offset(total, row), rescale), r,
                )  # fmt: skip
            weigh_values(
                own_sums, v_width, s, rescale, ones, values_at, kind, some, step, keys, v_dim,
                v_near,
            )  # fmt: skip


@Kernel
def merge_splits(row, work_at, outs, ins, kinds, sizes, strides, left):
    # One row of one head: the splits in their order, and the sink.
    out_at, lse_at = outs
    lengths_at, sinks_at = ins
    kind, wide, sink_kind, size_of_wide = kinds
    heads, kv_heads, seq_q, _, v_dim, splits, rows, _, width, v_width, capacity = sizes
    unit, query = row // seq_q, row % seq_q
    batch, head, group = unit // heads, unit % heads, heads // kv_heads
    kv_head, r = head // group, head % group * seq_q + query
    length = length_of(lengths_at, batch, capacity)
    first, last = first_split(length, seq_q, left), (length + SPLIT - 1) // SPLIT
    base = (batch * kv_heads + kv_head) * splits
    out = offset(pointer(out_at, kind), batch * strides[0] + head * strides[1] + query * strides[2])

    sink, found = -math.inf, 0.0
    if sinks_at:
        sink = np.float64(load(pointer(sinks_at, sink_kind), head))
    height = sink
    for split in range(first, last):
        _, _, top, _, _ = _spaces(work_at, base + split, wide, size_of_wide, rows, width, v_width)
        height = max(height, np.float64(load(top, r)))
    if height == -math.inf:
        for d in range(v_dim):
            store(out, d, real(wide, 0))
        store(pointer(lse_at, wide), row, real(wide, -math.inf))
        return
    found = math.exp(sink - height)
    _, sums, _, _, _ = _spaces(work_at, base + first, wide, size_of_wide, rows, width, v_width)
    sums = offset(sums, r * v_width)
    for split in range(first, last):
        _, more, top, total, _ = _spaces(
            work_at, base + split, wide, size_of_wide, rows, width, v_width
        )
        more = offset(more, r * v_width)
        weight = math.exp(np.float64(load(top, r)) - height)
        found += weight * np.float64(load(total, r))
        part = real(wide, weight)
        if split == first:
            for d in range(v_width):
                store(sums, d, part * load(sums, d))
        else:
            for d in range(v_width):
                store(sums, d, load(sums, d) + part * load(more, d))
    inverse = 1.0 / found
    for d in range(v_dim):
        x = element(sums, d, v_dim) if first < last else real(wide, 0)
        store(out, d, real(wide, np.float64(x) * inverse))
    store(pointer(lse_at, wide), row, real(wide, height + math.log(found)))
