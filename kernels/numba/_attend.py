"""Attention, forward: a block of queries on the lanes of vectors, keys and values tile by tile.

The scores lie transposed, a key a row: keys and values are then read as they lie in memory and the
softmax never crosses lanes. Tiles are copied to fp32 scratch, one set a thread, where dims and keys
are padded with zeros and hidden keys are zeros too, so that a NaN behind padding meets no product.
"""

import math

import numpy as np

from tilewise.kernels.numba._amx import release_tiles, use_tiles
from tilewise.kernels.numba._columns import keep_columns, scale_columns
from tilewise.kernels.numba._dropout import ANY
from tilewise.kernels.numba._matmul import (
    HEIGHT,
    PANEL,
    SET,
    UNIT,
    lanes,
    multiply,
    once,
    transpose,
)
from tilewise.kernels.numba._online_softmax import softmax_columns
from tilewise.kernels.numba._operands import (
    as_kind,
    clear_below,
    depth_of,
    either,
    pair_rows,
    per_word,
    read_deep,
    room,
    standing,
    widest,
    width_of,
)
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._rules import (
    DROPOUT,
    HIGHEST,
    KEYS,
    LINE,
    LINES,
    MASK,
    RESCALE,
    TOTAL,
    end_seen,
    first_seen,
    make_scores,
    mark_dropped,
    place_of,
)
from tilewise.kernels.numba._simd import INTEGER, load, offset, pointer, real, reciprocal, store
from tilewise.kernels.numba._tiles import (
    NONE,
    fill,
    padded,
    read_rows,
    read_tile,
    span_of,
)

BLOCK = LINE  # of queries that share a tile; a multiple of every PANEL


def scratch_of(dim: int, v_dim: int) -> int:
    """Elements of scratch a thread needs: as of numbers, which is enough for pairs."""
    width, v_width = widest(dim), widest(v_dim)
    stage = int(PANEL) * max(width, v_width, int(KEYS))
    return int((BLOCK + KEYS) * (width + v_width) + 2 * KEYS * PANEL + (LINES + 2) * LINE + stage)


@callee
def _read_queries(q_t, row_kind, stage, q, dim, row, rows, seq_q, sign, strides):
    """Transpose a block of queries, by words."""
    once()
    width, words = width_of(q_t, dim), width_of(q_t, dim) // per_word(q_t)
    lines, turned = as_kind(stage, row_kind), as_kind(q_t, stage)
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        for i in range(PANEL):
            place = row + start + i
            x = offset(q, place_of(strides, 0, place // seq_q, place % seq_q))
            y, there = offset(lines, i * width), 1 if start + i < rows else 0
            read_rows(y, width, x, width, there, UNIT, dim, sign, NONE, NONE)
        transpose(offset(turned, start * words), PANEL, stage, words, PANEL, words)


@callee
def base_of(highest, factor):
    """The highest score in units of log 2, as rounded where powers are taken above it."""
    return highest * factor[0]


@callee
def _begin(stats, sinks, with_sinks, factor, head, row, rows, seq_q):
    """Begin the sums of a block: with the sinks, or with nothing."""
    for i in range((rows + PANEL - 1) // PANEL * PANEL):
        highest, total = real(stats, -math.inf), real(stats, 0)
        if with_sinks and i < rows:
            highest = load(sinks, head + (row + i) // seq_q)
            if highest != real(stats, -math.inf):
                sink = np.float64(highest)
                exact = sink * np.float64(factor[0]) + sink * np.float64(factor[1])
                total = real(stats, 2.0 ** (exact - np.float64(base_of(highest, factor))))
        store(stats, HIGHEST + i, highest)
        store(stats, TOTAL + i, total)


@callee
def _write_block(
    out, highest, total, stage, out_t, width, stats, cols, row, rows, seq_q, factor, strides
):
    """Divide by the sums and store; rows that saw no key are 0. `strides`: of out, then of both
    statistics."""
    once()
    zero, tall = real(stats, 0), padded(cols)
    out_strides, strides = strides
    for i in range(rows):
        if i % PANEL == 0:
            transpose(stage, width, offset(out_t, i * width), PANEL, tall, PANEL)
        head, query = (row + i) // seq_q, (row + i) % seq_q
        y = offset(out, place_of(out_strides, 0, head, query))
        x, z = offset(stage, i % PANEL * width), load(stats, TOTAL + i)
        place = place_of(strides, 0, head, query)
        store(highest, place, base_of(load(stats, HIGHEST + i), factor))
        store(total, place, z)
        if z == zero:
            for j in range(cols):
                store(y, j, zero)
        else:
            r = reciprocal(np.float64(z))  # in fp32 it would be wrong for the whole row alike
            for j in range(cols):
                store(y, j, real(stats, np.float64(load(x, j)) * r))


@callee
def _attend(
    q_t, out_t, k_tile, values, scores, tile, stage, stats, counters, dim, v_dim,
    batch, head, heads, row, rows, first, keys, seq_q, seq_k, max_q, factor, rules, old,
):  # fmt: skip
    """Let a block of queries attend to one tile of keys, `first` and the next."""
    once()
    step, (v_tile, v_row, v_step) = lanes(scores), values
    words, v_width = width_of(k_tile, dim) // per_word(k_tile), width_of(k_tile, v_dim)
    tall_v = padded(v_dim)
    rescale, paired = offset(stats, RESCALE), as_kind(tile, k_tile)
    of_one_head = row // seq_q == (row + rows - 1) // seq_q
    all_keys = keys
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        used = min(PANEL, rows - start)
        cols = (used + step - 1) // step * step
        sums, panel_stats = offset(out_t, start * v_width), offset(stats, start)
        panel_q = offset(q_t, start * words)
        if of_one_head:  # none of the panel sees the keys after these
            latest = (row + start + used - 1) % seq_q
            keys = min(all_keys, end_seen(rules, latest, seq_q, seq_k) - first)
        if keys <= 0:
            if old == SET:
                fill(sums, PANEL * v_width)
            continue
        tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
        depth = depth_of(k_tile, dim)
        multiply(scores, PANEL, k_tile, words, UNIT, panel_q, PANEL, tall, cols, depth, SET)
        make_scores(
            scores, PANEL, tile, tile, stage, panel_stats, rules, batch, head, row + start, used,
            cols, first, keys, seq_q, seq_k,
        )  # fmt: skip
        for vector in range(cols // step):
            j = vector * step
            softmax_columns(
                offset(scores, j), PANEL, keys, factor, offset(panel_stats, HIGHEST + j),
                offset(panel_stats, TOTAL + j), offset(rescale, j),
            )  # fmt: skip
            if old != SET:
                scale_columns(offset(sums, j), PANEL, tall_v, offset(rescale, j))
        if rules[DROPOUT][ANY]:
            mark_dropped(
                tile, PANEL, counters, rules, batch, head, heads, row + start, used, cols, first,
                keys, seq_q, max_q,
            )  # fmt: skip
            for vector in range(cols // step):
                j = vector * step
                keep_columns(offset(scores, j), PANEL, keys, offset(tile, j))
        for vector in range(cols // step):
            j = vector * step
            pair_rows(offset(paired, j), offset(scores, j), PANEL, keys)
        clear_below(paired, PANEL, keys, cols)
        p, depth = either(k_tile, paired, scores), depth_of(k_tile, keys)
        multiply(sums, PANEL, v_tile, v_row, v_step, p, PANEL, tall_v, cols, depth, old)


@callee
def _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, tile_kind, dim, v_dim):
    """A thread's scratch: queries, sums, keys, values, scores, tile, stats, stage, counters."""
    width, v_width = room(dim), room(v_dim)
    q_t = offset(pointer(scratch_at, wide), slot * scratch_size)
    out_t = offset(q_t, BLOCK * width)
    k_tile = offset(out_t, BLOCK * v_width)
    v_tile = offset(k_tile, KEYS * width)
    scores = offset(v_tile, KEYS * v_width)
    tile = offset(scores, KEYS * PANEL)
    stats = offset(tile, KEYS * PANEL)
    stage = offset(stats, (LINES + 2) * LINE)
    before = (BLOCK + KEYS) * (width + v_width) + 2 * KEYS * PANEL + LINES * LINE
    counters = pointer(scratch_at + (slot * scratch_size + before) * size_of_wide, INTEGER)
    q_t, k_tile, v_tile = (
        as_kind(q_t, tile_kind), as_kind(k_tile, tile_kind), as_kind(v_tile, tile_kind)
    )  # fmt: skip
    return q_t, out_t, k_tile, v_tile, scores, tile, stats, stage, counters


@callee
def _attend_to_all(
    spaces, row_kind, k, v, k_stride, v_stride, dim, v_dim, batch, head, heads, row, rows, seq_q,
    seq_k, max_q, factor, rules, of_one_head,
):  # fmt: skip
    """Let a block of queries attend to all tiles of keys that any of them sees."""
    once()
    q_t, out_t, k_tile, v_tile, scores, tile, stats, stage, counters = spaces
    width, v_width, one = width_of(k_tile, dim), width_of(v_tile, v_dim), real(stats, 1)
    k_lines = as_kind(k_tile, row_kind)
    mask_at, mask_strides, padding = rules[MASK]
    lowest, highest = (row, row + rows - 1) if of_one_head else (0, seq_q - 1)
    begin = first_seen(rules, lowest, seq_q, seq_k) // KEYS
    last, old = end_seen(rules, highest, seq_q, seq_k), SET
    seen_at = mask_at + place_of(mask_strides, batch, head, 0)
    for number in range(max((last + KEYS - 1) // KEYS - begin, 0)):
        first = (begin + number) * KEYS
        keys, step = min(KEYS, last - first), mask_strides[3]
        seen = seen_at + first * step if padding else 0
        k_rows, v_rows = offset(k, first * k_stride), offset(v, first * v_stride)
        read_tile(k_lines, width, k_rows, k_stride, keys, dim, one, seen, step)
        read_deep(v_tile, v_width, v_rows, v_stride, keys, v_dim, one, seen, step)
        free = offset(v_tile, KEYS // 2 * v_width)
        values = standing(free, KEYS // 2, v_tile, v_width, depth_of(v_tile, keys), v_width)
        _attend(
            q_t, out_t, k_tile, values, scores, tile, stage, stats, counters, dim, v_dim,
            batch, head, heads, row, rows, first, keys, seq_q, seq_k, max_q, factor, rules, old,
        )  # fmt: skip
        old = UNIT
    if old == SET:
        fill(out_t, BLOCK * v_width)


@Kernel
def attend(
    slot, counter, items, scratch_at, scratch_size, outs, ins, kinds, sizes, strides, ends, rules,
    sign, factors,
):  # fmt: skip
    # A unit is one query head or, where queries are few, all that share a key. Strides are of
    # [batch, heads, rows] of out, q, k, v and the statistics; of packed sequences the first is 0.
    out_at, highest_at, total_at = outs
    q_at, k_at, v_at, sinks_at = ins
    kind, wide, sink_kind, size_of_wide, tile_kind, row_kind = kinds
    heads, kv_heads, max_q, max_k, dim, v_dim, shared = sizes
    out_strides, q_strides, k_strides, v_strides, row_strides = strides
    per_batch = heads // shared
    blocks = (max_q * shared + BLOCK - 1) // BLOCK
    units = items // blocks
    factor, sign = (real(wide, factors[0]), real(wide, factors[1])), real(wide, sign)
    sinks = pointer(sinks_at, sink_kind)
    spaces = _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, tile_kind, dim, v_dim)
    q_t, out_t, k_tile, v_tile, _, _, stats, stage, _ = spaces

    use_tiles(k_tile)
    while True:
        item = take(counter)
        if item >= items:
            break
        unit, row = item % units, (blocks - 1 - item // units) * BLOCK  # the longest first
        batch, head = unit // per_batch, unit % per_batch * shared
        kv_head = head // (heads // kv_heads)
        first_q, seq_q = span_of(ends[0], batch, max_q)
        first_k, seq_k = span_of(ends[1], batch, max_k)
        rows = min(BLOCK, seq_q * shared - row)
        if rows <= 0:
            continue
        q = offset(pointer(q_at, kind), place_of(q_strides, batch, head, first_q))
        _read_queries(q_t, row_kind, stage, q, dim, row, rows, seq_q, sign, q_strides)
        _begin(stats, sinks, sinks_at != 0, factor, head, row, rows, seq_q)
        _attend_to_all(
            spaces, row_kind,
            offset(pointer(k_at, kind), place_of(k_strides, batch, kv_head, first_k)),
            offset(pointer(v_at, kind), place_of(v_strides, batch, kv_head, first_k)),
            k_strides[2], v_strides[2], dim, v_dim, batch, head, heads, row, rows, seq_q, seq_k,
            max_q, factor, rules, shared == 1,
        )  # fmt: skip
        place = place_of(row_strides, batch, head, first_q)
        _write_block(
            offset(pointer(out_at, kind), place_of(out_strides, batch, head, first_q)),
            offset(pointer(highest_at, wide), place), offset(pointer(total_at, wide), place),
            stage, out_t, width_of(v_tile, v_dim), stats, v_dim, row, rows, seq_q, factor,
            (out_strides, row_strides),
        )  # fmt: skip
    release_tiles(k_tile)
