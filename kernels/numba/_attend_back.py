"""Attention, backward: each tile of keys takes in turn all blocks of queries of the heads that
share it, whose probabilities are made again. Who owns an element adds to it alone, in a fixed
order: dk, dv and dbias by tile, dq by part of the tiles, to be summed afterwards.
"""

import numpy as np

from tilewise.kernels.numba._amx import release_tiles, use_tiles
from tilewise.kernels.numba._columns import keep_columns, uncap_columns
from tilewise.kernels.numba._dropout import ANY
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
from tilewise.kernels.numba._online_softmax import softmax_gradient, softmax_gradient_alone
from tilewise.kernels.numba._operands import (
    as_kind,
    clear_below,
    depth_of,
    either,
    pair_lines,
    pair_rows,
    per_word,
    room,
    round_rows,
    standing,
    widest,
    width_of,
)
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._rules import (
    CAP,
    DROPOUT,
    KEYS,
    LINE,
    LINES,
    MASK,
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
    write_tile,
)

BLOCK = np.int64(64)  # of queries that share a tile; a multiple of every PANEL

# Lines of numbers, one for each query of a block: those of `_rules`, and after them these.
TOP, PART, SUM, DELTA, LESS = (np.int64(LINES + i) * LINE for i in range(5))


def scratch_of(dim: int, v_dim: int) -> int:
    """Elements of scratch a thread needs: as of numbers, which is enough for pairs."""
    width, v_width = widest(dim), widest(v_dim)
    tiles = KEYS * width + 4 * KEYS * BLOCK + 2 * PANEL * KEYS + KEYS
    return int(2 * (BLOCK + KEYS) * (width + v_width) + tiles + (LINES + 7) * LINE)


@callee
def _read_statistics(stats, highest, total, delta, dlse, with_lse, rows, tall):
    """Lines: the base of the powers, 1 / their sum and the sum, both 0 without one, delta, dlse."""
    once()
    none = real(stats, 0)
    for i in range(tall):
        top, part, summed, dot, less = none, none, none, none, none
        if i < rows and load(total, i) != none:
            top, summed, dot = load(highest, i), load(total, i), load(delta, i)
            part = reciprocal(summed)
            if with_lse:
                less = load(dlse, i)
        store(stats, TOP + i, top)
        store(stats, PART + i, part)
        store(stats, SUM + i, summed)
        store(stats, DELTA + i, dot)
        store(stats, LESS + i, less)


@callee
def _add_line(y, x, count):
    for j in range(count):
        store(y, j, load(y, j) + load(x, j))


@callee
def _add_bias(dbias, bias_strides, ds, stage, line, row, rows, first, keys):
    """Add the gradients of a tile of scores [keys, rows] to those of the bias of these queries.

    Where all queries have one bias they are summed first, in `line`.
    """
    once()
    query_step = bias_strides[2]
    fill(line, keys)
    width = lanes(ds)
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        deep = (keys + width - 1) // width * width
        transpose(stage, KEYS, offset(ds, start), BLOCK, deep, PANEL)
        for i in range(min(PANEL, rows - start)):
            x = offset(stage, i * KEYS)
            if query_step == 0:
                _add_line(line, x, keys)
            else:
                _add_line(offset(dbias, (row + start + i) * query_step + first), x, keys)
    if query_step == 0:
        _add_line(offset(dbias, first), line, keys)


@callee
def _block_spaces(block, k_tile, dim, v_dim):
    """A block's scratch: queries and the gradients of their outputs, each in rows and transposed;
    tiles of scores, of their gradients, of what is kept of them and of the tanh of a cap; a tile
    and a stage for the rules, a line, statistics."""
    width, v_width = room(dim), room(v_dim)
    q_t = offset(block, BLOCK * width)
    dout = offset(q_t, BLOCK * width)
    dout_t = offset(dout, BLOCK * v_width)
    scores = offset(dout_t, BLOCK * v_width)
    ds, marks = offset(scores, KEYS * BLOCK), offset(scores, 2 * KEYS * BLOCK)
    bounded, tile = offset(scores, 3 * KEYS * BLOCK), offset(scores, 4 * KEYS * BLOCK)
    stage = offset(tile, KEYS * PANEL)
    line = offset(stage, PANEL * KEYS)
    stats = offset(line, KEYS)
    return (
        as_kind(block, k_tile), as_kind(q_t, k_tile), as_kind(dout, k_tile),
        as_kind(dout_t, k_tile), scores, ds, marks, bounded, tile, stage, line, stats,
    )  # fmt: skip


@callee
def _read_block(deep, turned, lines, source, stride, rows, cols, factor):
    """A block of rows transposed, by words, and to be multiplied along its rows."""
    width, tall = width_of(turned, cols), padded(rows)
    words = width // per_word(turned)
    rows_of = either(turned, lines, deep)
    numbers = as_kind(rows_of, factor)
    read_rows(rows_of, width, source, stride, rows, tall, cols, factor, NONE, NONE)
    transpose(as_kind(turned, numbers), BLOCK, numbers, words, tall, words)
    pair_lines(deep, rows_of, width, rows, cols)


@callee
def _clear_column(tile, column, rows):
    for i in range(rows):
        store(tile, i * BLOCK + column, real(tile, 0))


@callee
def _make_tiles(
    spaces, k_tile, v_tile, counters, dim, v_dim, batch, head, heads, row, rows, first, keys,
    seq_q, seq_k, max_q, factor, rules,
):  # fmt: skip
    """The tiles of probabilities, after dropout, and of the gradients of scores."""
    once()
    _, q_t, _, dout_t, scores, ds, marks, bounded, tile, stage, _, stats = spaces
    step, per, dropping = lanes(scores), per_word(k_tile), rules[DROPOUT][ANY]
    words, v_words = width_of(k_tile, dim) // per, width_of(k_tile, v_dim) // per
    depth, v_depth = depth_of(k_tile, dim), depth_of(k_tile, v_dim)
    tall, cols = (keys + HEIGHT - 1) // HEIGHT * HEIGHT, padded(rows)
    alone = first_seen(rules, row, seq_q, seq_k) >= first and (
        end_seen(rules, row + rows - 1, seq_q, seq_k) <= first + keys
    )
    multiply(scores, BLOCK, k_tile, words, UNIT, q_t, BLOCK, tall, cols, depth, SET)
    multiply(ds, BLOCK, v_tile, v_words, UNIT, dout_t, BLOCK, tall, cols, v_depth, SET)
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        used = min(PANEL, rows - start)
        make_scores(
            offset(scores, start), BLOCK, offset(bounded, start), tile, stage,
            offset(stats, start), rules, batch, head, row + start, used, min(PANEL, cols - start),
            first, keys, seq_q, seq_k,
        )  # fmt: skip
        if dropping:
            mark_dropped(
                offset(marks, start), BLOCK, counters, rules, batch, head, heads, row + start,
                used, min(PANEL, cols - start), first, keys, seq_q, max_q,
            )  # fmt: skip
    for vector in range(cols // step):
        j = vector * step
        of_scores, of_ds = offset(scores, j), offset(ds, j)
        if dropping:
            keep_columns(of_ds, BLOCK, keys, offset(marks, j))
        top = offset(stats, TOP + j)
        sums = offset(stats, PART + j), offset(stats, SUM + j)
        if alone:
            less = offset(stats, LESS + j)
            softmax_gradient_alone(of_scores, of_ds, BLOCK, keys, factor, top, sums, less)
        else:
            delta = offset(stats, DELTA + j)
            softmax_gradient(of_scores, of_ds, BLOCK, keys, factor, top, sums, delta)
        if dropping:
            keep_columns(of_scores, BLOCK, keys, offset(marks, j))
    for j in range(rows, depth_of(k_tile, rows) * per):  # the last queries have none to pair with
        _clear_column(scores, j, keys)
        _clear_column(ds, j, keys)


@callee
def _gradients(
    dq, dk, dv, dbias, spaces, k_tile, k_deep, dim, v_dim, row, rows, first, keys, rules,
    bias_strides, wanted,
):  # fmt: skip
    """Add what one block of queries and one tile of keys give each other."""
    once()
    q, _, dout, _, scores, ds, marks, bounded, _, stage, line, _ = spaces
    want_dq, want_dk, want_dv, want_dbias = wanted
    step, per = lanes(scores), per_word(k_tile)
    width, v_width = width_of(k_tile, dim), width_of(k_tile, v_dim)
    tall, cols = (keys + HEIGHT - 1) // HEIGHT * HEIGHT, padded(rows)
    depth, wide = depth_of(k_tile, rows), depth_of(k_tile, rows) * per
    packed, across = as_kind(marks, k_tile), BLOCK // per
    p, s = either(k_tile, packed, scores), either(k_tile, packed, ds)
    if want_dv:
        for j in range(0, wide, step):
            round_rows(offset(packed, j // per), offset(scores, j), BLOCK, keys)
        multiply(
            dv, v_width, p, across, UNIT, dout, v_width, tall, padded(v_dim), depth, ADD
        )  # fmt: skip
    if want_dbias:
        _add_bias(dbias, bias_strides, ds, stage, line, row, rows, first, keys)
    if rules[CAP] > 0:
        for j in range(0, cols, step):
            uncap_columns(offset(ds, j), BLOCK, keys, offset(bounded, j))
    if want_dk:
        for j in range(0, wide, step):
            round_rows(offset(packed, j // per), offset(ds, j), BLOCK, keys)
        multiply(dk, width, s, across, UNIT, q, width, tall, padded(dim), depth, ADD)
    if want_dq:
        for j in range(0, cols, step):
            pair_rows(offset(packed, j), offset(ds, j), BLOCK, keys)
        clear_below(packed, BLOCK, keys, cols)
        free, depth = offset(packed, KEYS // 2 * BLOCK), depth_of(k_tile, keys)
        a, a_row, a_step = standing(free, KEYS // 2, s, BLOCK, depth, cols)
        multiply(dq, width, a, a_row, a_step, k_deep, width, cols, padded(dim), depth, ADD)


@callee
def _one_head(
    dq, dk, dv, dbias, k_tile, k_deep, v_tile, block, row_kind, counters, dout, dlse, with_lse, q,
    highest, total, delta, dim, v_dim, batch, head, heads, first, keys, seq_q, seq_k, max_q, sign,
    factor, rules, bias_strides, wanted, dout_stride, q_stride,
):  # fmt: skip
    """Take all queries of one head, block by block, to one tile of keys."""
    once()
    width, one = width_of(k_tile, dim), real(block, 1)
    spaces = _block_spaces(block, k_tile, dim, v_dim)
    q_deep, q_t, dout_deep, dout_t, scores, _, _, _, _, _, _, stats = spaces
    lines = as_kind(scores, row_kind)
    for row in range(0, seq_q, BLOCK):
        rows = min(BLOCK, seq_q - row)
        if end_seen(rules, row + rows - 1, seq_q, seq_k) <= first:
            continue
        if first_seen(rules, row, seq_q, seq_k) >= first + keys:
            continue
        # Of whole rows of a product, or what it makes of the others would be added to theirs.
        seen = min(keys, padded(end_seen(rules, row + rows - 1, seq_q, seq_k) - first))
        dout_rows = offset(dout, row * dout_stride)
        _read_block(q_deep, q_t, lines, offset(q, row * q_stride), q_stride, rows, dim, sign)
        _read_block(dout_deep, dout_t, lines, dout_rows, dout_stride, rows, v_dim, one)
        _read_statistics(
            stats, offset(highest, row), offset(total, row), offset(delta, row), offset(dlse, row),
            with_lse, rows, padded(rows),
        )  # fmt: skip
        _make_tiles(
            spaces, k_tile, v_tile, counters, dim, v_dim, batch, head, heads, row, rows, first,
            seen, seq_q, seq_k, max_q, factor, rules,
        )  # fmt: skip
        _gradients(
            offset(dq, row * width), dk, dv, dbias, spaces, k_tile, k_deep, dim, v_dim, row, rows,
            first, seen, rules, bias_strides, wanted,
        )  # fmt: skip


@callee
def _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, tile_kind, dim, v_dim):
    """A thread's scratch: keys, and to be multiplied along them, values, the gradients of keys and
    of values, what a block needs, counters."""
    width, v_width = room(dim), room(v_dim)
    k_tile = offset(pointer(scratch_at, wide), slot * scratch_size)
    k_deep = offset(k_tile, KEYS * width)
    v_tile = offset(k_deep, KEYS * width)
    dk_tile = offset(v_tile, KEYS * v_width)
    dv_tile = offset(dk_tile, KEYS * width)
    block = offset(dv_tile, KEYS * v_width)
    before = (slot + 1) * scratch_size - 2 * BLOCK
    counters = pointer(scratch_at + before * size_of_wide, INTEGER)
    k_tile, k_deep = as_kind(k_tile, tile_kind), as_kind(k_deep, tile_kind)
    return k_tile, k_deep, as_kind(v_tile, tile_kind), dk_tile, dv_tile, block, counters


@callee
def _all_heads(
    spaces, grads, ins, kinds, sizes, strides, rules, wanted, spans, batch, kv_head, part, first,
    keys, sign, factor,
):  # fmt: skip
    """Take all query heads that share a tile of keys to it."""
    once()
    k_tile, k_deep, v_tile, dk_tile, dv_tile, block, counters = spaces
    dq_at, _, _, dbias_at = grads
    dout_at, dlse_at, q_at, k_at, v_at, highest_at, total_at, delta_at = ins
    kind, wide, _, _, row_kind = kinds
    _, heads, kv_heads, max_q, _, dim, v_dim, _, _, _ = sizes
    _, _, dout_strides, q_strides, k_strides, v_strides = strides[:6]
    row_strides, dbias_strides, dq_strides = strides[6:]
    first_q, seq_q, first_k, seq_k = spans
    width, v_width, group = width_of(k_tile, dim), width_of(v_tile, v_dim), heads // kv_heads
    k_lines, v_lines = as_kind(k_tile, row_kind), as_kind(v_tile, row_kind)
    mask_at, mask_strides, padding = rules[MASK]
    one, step = real(wide, 1), mask_strides[3]
    k = offset(pointer(k_at, kind), place_of(k_strides, batch, kv_head, first_k + first))
    v = offset(pointer(v_at, kind), place_of(v_strides, batch, kv_head, first_k + first))
    for head in range(kv_head * group, (kv_head + 1) * group):
        seen = mask_at + place_of(mask_strides, batch, head, 0) + first * step
        seen = seen if padding else 0
        read_tile(k_lines, width, k, k_strides[2], keys, dim, one, seen, step)
        read_tile(v_lines, v_width, v, v_strides[2], keys, v_dim, one, seen, step)
        pair_lines(k_deep, k_lines, width, keys, dim)
        sums = part * dq_strides[0] + place_of(dq_strides[1:], batch, head, first_q)
        place = place_of(row_strides, batch, head, first_q)
        _one_head(
            offset(pointer(dq_at, wide), sums), dk_tile, dv_tile,
            offset(pointer(dbias_at, wide), place_of(dbias_strides, batch, head, 0)),
            k_tile, either(k_tile, k_deep, k_tile), v_tile, block, row_kind, counters,
            offset(pointer(dout_at, kind), place_of(dout_strides, batch, head, first_q)),
            offset(pointer(dlse_at, wide), place), dlse_at != 0,
            offset(pointer(q_at, kind), place_of(q_strides, batch, head, first_q)),
            offset(pointer(highest_at, wide), place), offset(pointer(total_at, wide), place),
            offset(pointer(delta_at, wide), place),
            dim, v_dim, batch, head, heads, first, keys, seq_q, seq_k, max_q, sign, factor, rules,
            dbias_strides, wanted, dout_strides[2], q_strides[2],
        )  # fmt: skip


@Kernel
def differentiate(
    slot, counter, items, scratch_at, scratch_size, grads, ins, kinds, sizes, strides, ends, rules,
    wanted, sign, scale, factors,
):  # fmt: skip
    # An item is every `parts`-th tile of the keys of some kv heads of some batches: one of each,
    # or all of those whose bias is one. dq has room to pad the rows of a sequence, dbias is [batch
    # or 1, heads or 1, rows or 1, keys].
    _, dk_at, dv_at, _ = grads
    kind, wide, size_of_wide, tile_kind, _ = kinds
    _, _, kv_heads, max_q, max_k, dim, v_dim, parts, at_once, heads_at_once = sizes
    dk_strides, dv_strides = strides[:2]
    factor, sign = (real(wide, factors[0]), real(wide, factors[1])), real(wide, sign)
    spaces = _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, tile_kind, dim, v_dim)
    k_tile, _, v_tile, dk_tile, dv_tile, _, _ = spaces
    width, v_width = width_of(k_tile, dim), width_of(v_tile, v_dim)

    use_tiles(k_tile)
    tiles, head_groups = (max_k + KEYS - 1) // KEYS, kv_heads // heads_at_once
    while True:
        item = take(counter)
        if item >= items:
            break
        part, unit = item % parts, item // parts
        batch_start, head_start = unit // head_groups * at_once, unit % head_groups * heads_at_once
        for turn in range((tiles - part + parts - 1) // parts * at_once * heads_at_once):
            first = (part + turn // (at_once * heads_at_once) * parts) * KEYS
            batch = batch_start + turn // heads_at_once % at_once
            kv_head = head_start + turn % heads_at_once
            first_q, seq_q = span_of(ends[0], batch, max_q)
            first_k, seq_k = span_of(ends[1], batch, max_k)
            keys = min(KEYS, seq_k - first)
            if keys <= 0:
                continue
            fill(dk_tile, KEYS * width)
            fill(dv_tile, KEYS * v_width)
            _all_heads(
                spaces, grads, ins, kinds, sizes, strides, rules, wanted,
                (first_q, seq_q, first_k, seq_k), batch, kv_head, part, first, keys, sign, factor,
            )  # fmt: skip
            dk = offset(pointer(dk_at, kind), place_of(dk_strides, batch, kv_head, first_k + first))
            dv = offset(pointer(dv_at, kind), place_of(dv_strides, batch, kv_head, first_k + first))
            if wanted[1]:
                write_tile(dk, dk_tile, width, NONE, keys, dim, dk_strides[2], real(wide, scale))
            if wanted[2]:
                write_tile(dv, dv_tile, v_width, NONE, keys, v_dim, dv_strides[2], real(wide, 1))
    release_tiles(k_tile)
