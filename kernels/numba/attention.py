"""Attention on the CPU: a block of queries on the lanes of vectors, keys and values tile by tile.

The scores lie transposed, a key a row: keys and values are then read as they lie in memory and the
softmax never crosses lanes. Tiles are copied to fp32 scratch, one set a thread, where dims and keys
are padded with zeros and hidden keys are zeros too, so that a NaN behind padding meets no product.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._matmul import (
    ADD,
    HEIGHT,
    PANEL,
    SET,
    UNIT,
    lanes,
    multiply,
    once,
    transpose,
)
from tilewise.kernels.numba._online_softmax import (
    scale_columns,
    scaling,
    softmax_columns,
    softmax_gradient,
)
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._shared import same_layout, thread_scratch, wide_dtype
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store
from tilewise.kernels.numba._tiles import (
    NONE,
    fill,
    hide,
    mask_options,
    padded,
    read_rows,
    read_tile,
    rounded,
    start_of,
    write_tile,
)

KEYS = np.int64(128)  # in a tile, which with its scores stays in the L2 cache
BLOCK = np.int64(64)  # of queries that share a tile; a multiple of every PANEL

# Dq is summed in parts while there are fewer tasks, and memory, than this. By the sizes alone, so
# that the bits do not depend on the number of threads.
TASKS = 8
PART_ELEMENTS = 1 << 26


@callee
def _read_queries(q_t, stage, stats, q, dim, row, rows, seq_q, sign, q_strides):
    """Transpose a block of queries, and begin its sums."""
    once()
    width = padded(dim)
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        for i in range(PANEL):
            place = row + start + i
            x = offset(q, place // seq_q * q_strides[1] + place % seq_q * q_strides[2])
            y, there = offset(stage, i * width), 1 if start + i < rows else 0
            read_rows(y, width, x, width, there, UNIT, dim, sign, NONE, NONE)
            store(stats, start + i, real(stats, -math.inf))
            store(stats, BLOCK + start + i, real(stats, 0))
        transpose(offset(q_t, start * width), PANEL, stage, width, PANEL, width)


@callee
def _write_block(out, highest, total, stage, out_t, stats, cols, row, rows, seq_q, factor, strides):
    """Divide by the sums and store; rows that saw no key are 0."""
    once()
    width, zero = padded(cols), real(stats, 0)
    for i in range(rows):
        if i % PANEL == 0:
            transpose(stage, width, offset(out_t, i * width), PANEL, width, PANEL)
        place = row + i
        y = offset(out, place // seq_q * strides[1] + place % seq_q * strides[2])
        x, z = offset(stage, i % PANEL * width), load(stats, BLOCK + i)
        store(highest, i, load(stats, i) * factor[0])
        store(total, i, z)
        if z == zero:
            for j in range(cols):
                store(y, j, zero)
        else:
            r = 1.0 / np.float64(z)  # in fp32 it would be wrong for the whole row alike
            for j in range(cols):
                store(y, j, real(stats, np.float64(load(x, j)) * r))


@callee
def _attend(
    q_t, out_t, k_tile, v_tile, scores, stats, dim, v_dim, row, rows, first, keys, seq_q, seq_k,
    factor, causal, mask, mask_strides,
):  # fmt: skip
    """Let a block of queries attend to one tile of keys, `first` and the next."""
    once()
    width, v_width, step = padded(dim), padded(v_dim), lanes(scores)
    highest, total = stats, offset(stats, BLOCK)
    rescale, limits = offset(stats, 2 * BLOCK), offset(stats, 3 * BLOCK)
    tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        used = min(PANEL, rows - start)
        cols = (used + step - 1) // step * step
        sums = offset(out_t, start * v_width)
        panel_q = offset(q_t, start * width)
        multiply(scores, PANEL, k_tile, width, UNIT, panel_q, PANEL, tall, cols, dim, SET)
        hide(
            scores, PANEL, limits, cols, used, row + start, first, keys, seq_q, seq_k,
            causal, mask, mask_strides,
        )  # fmt: skip
        for vector in range(cols // step):
            j = vector * step
            softmax_columns(
                offset(scores, j), PANEL, keys, factor,
                offset(highest, start + j), offset(total, start + j), offset(rescale, j),
            )  # fmt: skip
            if first:
                scale_columns(offset(sums, j), PANEL, v_width, offset(rescale, j))
        multiply(sums, PANEL, v_tile, UNIT, v_width, scores, PANEL, v_width, cols, keys, first)


@Kernel
def _forward(
    slot, counter, items, scratch_at, scratch_size, out_at, highest_at, total_at,
    q_at, k_at, v_at, mask_at, kind, wide, sizes, out_strides, q_strides, k_strides, v_strides,
    mask_strides, padding, causal, sign, scale, factors,
):  # fmt: skip
    # A unit is one query head or, where queries are few, all that share a key.
    heads, kv_heads, seq_q, seq_k, dim, v_dim, shared = sizes
    width, v_width = padded(dim), padded(v_dim)
    per_batch, all_rows = heads // shared, seq_q * shared
    blocks = (all_rows + BLOCK - 1) // BLOCK
    units = items // blocks
    one, sign = real(wide, 1), real(wide, sign)
    factor = real(wide, factors[0]), real(wide, factors[1])

    q_t = offset(pointer(scratch_at, wide), slot * scratch_size)
    out_t = offset(q_t, BLOCK * width)
    k_tile = offset(out_t, BLOCK * v_width)
    v_tile = offset(k_tile, KEYS * width)
    scores = offset(v_tile, KEYS * v_width)
    stats = offset(scores, KEYS * PANEL)
    stage = offset(stats, 4 * BLOCK)

    while True:
        item = take(counter)
        if item >= items:
            break
        unit, row = item % units, (blocks - 1 - item // units) * BLOCK  # the longest first
        batch, head = unit // per_batch, unit % per_batch * shared
        kv_head, rows = head // (heads // kv_heads), min(BLOCK, all_rows - row)
        mask = mask_at and mask_at + start_of(mask_strides, batch, head)
        k = offset(pointer(k_at, kind), start_of(k_strides, batch, kv_head))
        v = offset(pointer(v_at, kind), start_of(v_strides, batch, kv_head))
        q = offset(pointer(q_at, kind), start_of(q_strides, batch, head))
        _read_queries(q_t, stage, stats, q, dim, row, rows, seq_q, sign, q_strides)

        last = seq_k
        if causal and shared == 1:
            last = min(max(row + rows + seq_k - seq_q, 0), seq_k)
        for tile in range((last + KEYS - 1) // KEYS):
            first = tile * KEYS
            keys, step = min(KEYS, last - first), mask_strides[3]
            seen = mask + first * step if padding else 0
            k_rows, v_rows = offset(k, first * k_strides[2]), offset(v, first * v_strides[2])
            read_tile(k_tile, width, k_rows, k_strides[2], keys, dim, one, seen, step)
            read_tile(v_tile, v_width, v_rows, v_strides[2], keys, v_dim, one, seen, step)
            _attend(
                q_t, out_t, k_tile, v_tile, scores, stats, dim, v_dim, row, rows, first, keys,
                seq_q, seq_k, factor, causal, mask, mask_strides,
            )  # fmt: skip

        out = offset(pointer(out_at, kind), start_of(out_strides, batch, head))
        place = (batch * heads + head) * seq_q + row
        highest = offset(pointer(highest_at, wide), place)
        total = offset(pointer(total_at, wide), place)
        _write_block(
            out, highest, total, stage, out_t, stats, v_dim, row, rows, seq_q, factor, out_strides
        )


@callee
def _read_statistics(
    stats, dout, dlse, with_lse, out, highest, total, rows, v_dim, tall, dout_stride, out_stride
):
    """Three lines: the highest score, 1 / the sum or 0, delta = sum(dout * out) - dlse."""
    once()
    for i in range(tall):
        top, part, delta = real(stats, 0), real(stats, 0), real(stats, 0)
        if i < rows and load(total, i) != part:
            top, part = load(highest, i), real(stats, 1) / load(total, i)
            x, y = offset(dout, i * dout_stride), offset(out, i * out_stride)
            dot = 0.0  # in fp64: what is wrong here is wrong for all keys alike
            for j in range(v_dim):
                dot += np.float64(load(x, j)) * np.float64(load(y, j))
            if with_lse:
                dot -= np.float64(load(dlse, i))
            delta = real(stats, dot)
        store(stats, i, top)
        store(stats, BLOCK + i, part)
        store(stats, 2 * BLOCK + i, delta)


@callee
def _gradients(
    dq, dk, dv, k_tile, v_tile, block, dim, v_dim, row, rows, first, keys, seq_q, seq_k,
    factor, causal, mask, mask_strides,
):  # fmt: skip
    """Add what one block of queries and one tile of keys give each other."""
    once()
    width, v_width, step = padded(dim), padded(v_dim), lanes(block)
    q, q_t = block, offset(block, BLOCK * width)
    dout = offset(q_t, BLOCK * width)
    dout_t = offset(dout, BLOCK * v_width)
    scores = offset(dout_t, BLOCK * v_width)
    ds = offset(scores, KEYS * BLOCK)
    stats = offset(ds, KEYS * BLOCK)
    part, delta, limits = offset(stats, BLOCK), offset(stats, 2 * BLOCK), offset(stats, 3 * BLOCK)
    tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
    cols = padded(rows)

    multiply(scores, BLOCK, k_tile, width, UNIT, q_t, BLOCK, tall, cols, dim, SET)
    multiply(ds, BLOCK, v_tile, v_width, UNIT, dout_t, BLOCK, tall, cols, v_dim, SET)
    hide(
        scores, BLOCK, limits, cols, rows, row, first, keys, seq_q, seq_k,
        causal, mask, mask_strides,
    )  # fmt: skip
    for vector in range(cols // step):
        j = vector * step
        softmax_gradient(
            offset(scores, j), offset(ds, j), BLOCK, keys, factor,
            offset(stats, j), offset(part, j), offset(delta, j),
        )  # fmt: skip
    multiply(dv, v_width, scores, BLOCK, UNIT, dout, v_width, tall, v_width, rows, ADD)
    multiply(dk, width, ds, BLOCK, UNIT, q, width, tall, width, rows, ADD)
    multiply(dq, width, ds, UNIT, BLOCK, k_tile, width, cols, width, keys, ADD)


@callee
def _one_head(
    dq, dk, dv, k_tile, v_tile, block, dout, dlse, with_lse, q, out, highest, total, dim, v_dim,
    first, keys, seq_q, seq_k, sign, factor, causal, mask, mask_strides, dout_stride, q_stride,
    out_stride,
):  # fmt: skip
    """Take all queries of one head, block by block, to one tile of keys."""
    once()
    width, v_width = padded(dim), padded(v_dim)
    q_block, q_t = block, offset(block, BLOCK * width)
    dout_block = offset(q_t, BLOCK * width)
    dout_t = offset(dout_block, BLOCK * v_width)
    stats = offset(dout_t, BLOCK * v_width + 2 * KEYS * BLOCK)
    one = real(block, 1)
    for row in range(0, seq_q, BLOCK):
        rows = min(BLOCK, seq_q - row)
        if causal and row + rows + seq_k - seq_q <= first:
            continue
        tall = padded(rows)
        q_rows, dout_rows = offset(q, row * q_stride), offset(dout, row * dout_stride)
        read_rows(q_block, width, q_rows, q_stride, rows, tall, dim, sign, NONE, NONE)
        read_rows(dout_block, v_width, dout_rows, dout_stride, rows, tall, v_dim, one, NONE, NONE)
        transpose(q_t, BLOCK, q_block, width, tall, width)
        transpose(dout_t, BLOCK, dout_block, v_width, tall, v_width)
        _read_statistics(
            stats, dout_rows, offset(dlse, row), with_lse, offset(out, row * out_stride),
            offset(highest, row), offset(total, row), rows, v_dim, tall, dout_stride, out_stride,
        )  # fmt: skip
        _gradients(
            offset(dq, row * width), dk, dv, k_tile, v_tile, block, dim, v_dim, row, rows,
            first, keys, seq_q, seq_k, factor, causal, mask, mask_strides,
        )  # fmt: skip


@Kernel
def _backward(
    slot, counter, items, scratch_at, scratch_size, dq_at, dk_at, dv_at,
    dout_at, dlse_at, q_at, k_at, v_at, mask_at, out_at, highest_at, total_at, kind, wide, sizes,
    dk_strides, dv_strides, dout_strides, q_strides, k_strides, v_strides, mask_strides,
    out_strides, padding, causal, sign, scale, factors,
):  # fmt: skip
    # An item is every `parts`-th tile of one kv head; dq is [parts, batch, heads, rows, width].
    heads, kv_heads, seq_q, seq_k, dim, v_dim, parts = sizes
    width, v_width, group = padded(dim), padded(v_dim), heads // kv_heads
    units, tall_q = items // parts, padded(seq_q)
    one, sign = real(wide, 1), real(wide, sign)
    factor = real(wide, factors[0]), real(wide, factors[1])

    k_tile = offset(pointer(scratch_at, wide), slot * scratch_size)
    v_tile = offset(k_tile, KEYS * width)
    dk_tile = offset(v_tile, KEYS * v_width)
    dv_tile = offset(dk_tile, KEYS * width)
    block = offset(dv_tile, KEYS * v_width)

    while True:
        item = take(counter)
        if item >= items:
            break
        part, batch, kv_head = item // units, item % units // kv_heads, item % units % kv_heads
        k = offset(pointer(k_at, kind), start_of(k_strides, batch, kv_head))
        v = offset(pointer(v_at, kind), start_of(v_strides, batch, kv_head))
        dk = offset(pointer(dk_at, kind), start_of(dk_strides, batch, kv_head))
        dv = offset(pointer(dv_at, kind), start_of(dv_strides, batch, kv_head))
        for tile in range(part, (seq_k + KEYS - 1) // KEYS, parts):
            first = tile * KEYS
            keys, step = min(KEYS, seq_k - first), mask_strides[3]
            k_rows, v_rows = offset(k, first * k_strides[2]), offset(v, first * v_strides[2])
            fill(dk_tile, KEYS * (width + v_width))
            for head in range(kv_head * group, (kv_head + 1) * group):
                mask = mask_at and mask_at + start_of(mask_strides, batch, head)
                seen = mask + first * step if padding else 0
                read_tile(k_tile, width, k_rows, k_strides[2], keys, dim, one, seen, step)
                read_tile(v_tile, v_width, v_rows, v_strides[2], keys, v_dim, one, seen, step)
                index = batch * heads + head
                _one_head(
                    offset(pointer(dq_at, wide), (part * units * group + index) * tall_q * width),
                    dk_tile, dv_tile, k_tile, v_tile, block,
                    offset(pointer(dout_at, kind), start_of(dout_strides, batch, head)),
                    offset(pointer(dlse_at, wide), index * seq_q), dlse_at,
                    offset(pointer(q_at, kind), start_of(q_strides, batch, head)),
                    offset(pointer(out_at, kind), start_of(out_strides, batch, head)),
                    offset(pointer(highest_at, wide), index * seq_q),
                    offset(pointer(total_at, wide), index * seq_q),
                    dim, v_dim, first, keys, seq_q, seq_k, sign, factor,
                    causal, mask, mask_strides, dout_strides[2], q_strides[2], out_strides[2],
                )  # fmt: skip
            write_tile(dk, dk_tile, width, first, keys, dim, dk_strides[2], real(wide, scale))
            write_tile(dv, dv_tile, v_width, first, keys, v_dim, dv_strides[2], one)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: None, alibi_slopes: None,
    sinks: None, left: int, right: int, softcap: float, scale: float, *dropout: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask broadcastable
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    out = same_layout(q, v_dim)
    highest = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    total = torch.empty_like(highest)
    group, width, v_width = heads // kv_heads, rounded(dim), rounded(v_dim)
    own_padding = mask is not None and mask.shape[2] == 1 and mask.shape[1] > 1
    shared = group if seq_q < BLOCK and not own_padding else 1
    items = batch * heads // shared * -(-seq_q * shared // int(BLOCK))
    counter, scratch, size = thread_scratch(
        highest, (BLOCK + KEYS) * (width + v_width) + KEYS * PANEL + 4 * BLOCK
        + PANEL * max(width, v_width),
    )  # fmt: skip
    mask_at, mask_strides, padding = mask_options(mask)
    _forward(
        torch.get_num_threads(), total.numel() * seq_k, address(counter), items,
        address(scratch), size, address(out), address(highest), address(total),
        address(q), address(k), address(v), mask_at, kind(q), kind(total),
        (heads, kv_heads, seq_q, seq_k, dim, v_dim, shared),
        out.stride(), q.stride(), k.stride(), v.stride(), mask_strides,
        padding, int(right == 0), *scaling(scale, q.dtype == torch.float64),
    )  # fmt: skip
    return out, highest, total


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    bias: None, alibi_slopes: None, sinks: None, out: Tensor, highest: Tensor, total: Tensor,
    left: int, right: int, softcap: float, scale: float, dropout_p: float, seeds: None,
    offsets: None, seed: int, offset: int, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_forward`, dlse [batch, heads, seq_q] -> dq, dk, dv, laid out as q, k
    and v, and no dbias and no dsinks; what is not wanted is empty."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    dk, dv = same_layout(k, dim), same_layout(v, v_dim)
    units, width, v_width = batch * kv_heads, rounded(dim), rounded(v_dim)
    tiles = -(-seq_k // int(KEYS))
    parts = min(tiles, max(TASKS // units, 1), max(PART_ELEMENTS // q.numel(), 1))
    sums = total.new_zeros(parts, batch, heads, rounded(seq_q), width)
    counter, scratch, size = thread_scratch(
        total, 2 * (BLOCK + KEYS) * (width + v_width) + 2 * KEYS * BLOCK + 4 * BLOCK
    )
    mask_at, mask_strides, padding = mask_options(mask)
    _backward(
        torch.get_num_threads(), 2 * total.numel() * seq_k, address(counter), units * parts,
        address(scratch), size, address(sums), address(dk), address(dv), address(dout),
        address(dlse), address(q), address(k), address(v), mask_at, address(out), address(highest),
        address(total), kind(q), kind(total), (heads, kv_heads, seq_q, seq_k, dim, v_dim, parts),
        dk.stride(), dv.stride(), dout.stride(), q.stride(), k.stride(), v.stride(), mask_strides,
        out.stride(), padding, int(right == 0), *scaling(scale, q.dtype == torch.float64),
    )  # fmt: skip
    for part in sums[1:]:
        sums[0] += part
    dq = same_layout(q, dim).copy_(sums[0, :, :, :seq_q, :dim].mul_(scale))
    grads = zip((dq, dk, dv, None, None), wanted, strict=True)
    return tuple(t if w else q.new_empty(0) for t, w in grads)
