"""Attention, backward: each tile of keys takes in turn all blocks of queries of the heads that
share it, whose probabilities are made again. Who owns an element adds to it alone, in a fixed
order: dk, dv and dbias by tile, dq by part of the tiles, to be summed afterwards.
"""

import numpy as np

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
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._rules import (
    BLOCK,
    CAP,
    DROPOUT,
    KEYS,
    LINES,
    MASK,
    end_seen,
    first_seen,
    make_scores,
    mark_dropped,
    place_of,
)
from tilewise.kernels.numba._simd import INTEGER, load, offset, pointer, real, store
from tilewise.kernels.numba._tiles import (
    NONE,
    fill,
    padded,
    read_rows,
    read_tile,
    rounded,
    span_of,
    write_tile,
)

# Lines of BLOCK numbers, one for each query of a block: those of `_rules`, and after them these.
TOP, PART, DELTA, LESS = (np.int64(LINES + i) * BLOCK for i in range(4))


def scratch_of(dim: int, v_dim: int) -> int:
    """Elements of scratch a thread needs."""
    width, v_width = rounded(dim), rounded(v_dim)
    tiles = 4 * KEYS * BLOCK + KEYS * PANEL + PANEL * KEYS + KEYS
    return int(2 * (BLOCK + KEYS) * (width + v_width) + tiles + (LINES + 6) * BLOCK)


@callee
def _read_statistics(
    stats, dout, dlse, with_lse, out, highest, total, rows, v_dim, tall, dout_stride, out_stride
):
    """Lines: the highest score, 1 / the sum or 0, delta = sum(dout * out) - dlse, and dlse."""
    once()
    for i in range(tall):
        top, part, less, dot = real(stats, 0), real(stats, 0), real(stats, 0), 0.0
        if i < rows and load(total, i) != part:
            top, part = load(highest, i), real(stats, 1) / load(total, i)
            x, y = offset(dout, i * dout_stride), offset(out, i * out_stride)
            # In fp64: what is wrong here is wrong for all keys alike.
            for j in range(v_dim):
                dot += np.float64(load(x, j)) * np.float64(load(y, j))
            if with_lse:
                less = load(dlse, i)
        store(stats, TOP + i, top)
        store(stats, PART + i, part)
        store(stats, DELTA + i, real(stats, dot - np.float64(less)))
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
def _gradients(
    dq, dk, dv, dbias, k_tile, v_tile, block, counters, dim, v_dim, batch, head, heads, row, rows,
    first, keys, seq_q, seq_k, max_q, factor, rules, bias_strides, wanted,
):  # fmt: skip
    """Add what one block of queries and one tile of keys give each other."""
    once()
    width, v_width, step = padded(dim), padded(v_dim), lanes(block)
    want_dq, want_dk, want_dv, want_dbias = wanted
    q, q_t = block, offset(block, BLOCK * width)
    dout = offset(q_t, BLOCK * width)
    dout_t = offset(dout, BLOCK * v_width)
    scores = offset(dout_t, BLOCK * v_width)
    ds, marks = offset(scores, KEYS * BLOCK), offset(scores, 2 * KEYS * BLOCK)
    bounded, tile = offset(scores, 3 * KEYS * BLOCK), offset(scores, 4 * KEYS * BLOCK)
    stage = offset(tile, KEYS * PANEL)
    line = offset(stage, PANEL * KEYS)
    stats = offset(line, KEYS)
    tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
    cols, dropping = padded(rows), rules[DROPOUT][ANY]
    alone = first_seen(rules, row, seq_q, seq_k) >= first and (
        end_seen(rules, row + rows - 1, seq_q, seq_k) <= first + keys
    )

    multiply(scores, BLOCK, k_tile, width, UNIT, q_t, BLOCK, tall, cols, dim, SET)
    multiply(ds, BLOCK, v_tile, v_width, UNIT, dout_t, BLOCK, tall, cols, v_dim, SET)
    for panel in range((rows + PANEL - 1) // PANEL):
        start = panel * PANEL
        used = min(PANEL, rows - start)
        make_scores(
            offset(scores, start), BLOCK, offset(bounded, start), tile, stage, offset(stats, start),
            rules, batch, head, row + start, used, min(PANEL, cols - start), first, keys,
            seq_q, seq_k,
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
        top, part = offset(stats, TOP + j), offset(stats, PART + j)
        if alone:
            less = offset(stats, LESS + j)
            softmax_gradient_alone(of_scores, of_ds, BLOCK, keys, factor, top, part, less)
        else:
            delta = offset(stats, DELTA + j)
            softmax_gradient(of_scores, of_ds, BLOCK, keys, factor, top, part, delta)
        if dropping:
            keep_columns(of_scores, BLOCK, keys, offset(marks, j))
    if want_dv:
        multiply(dv, v_width, scores, BLOCK, UNIT, dout, v_width, tall, v_width, rows, ADD)
    if want_dbias:
        _add_bias(dbias, bias_strides, ds, stage, line, row, rows, first, keys)
    if rules[CAP] > 0:
        for vector in range(cols // step):
            j = vector * step
            uncap_columns(offset(ds, j), BLOCK, keys, offset(bounded, j))
    if want_dk:
        multiply(dk, width, ds, BLOCK, UNIT, q, width, tall, width, rows, ADD)
    if want_dq:
        multiply(dq, width, ds, UNIT, BLOCK, k_tile, width, cols, width, keys, ADD)


@callee
def _one_head(
    dq, dk, dv, dbias, k_tile, v_tile, block, counters, dout, dlse, with_lse, q, out, highest,
    total, dim, v_dim, batch, head, heads, first, keys, seq_q, seq_k, max_q, sign, factor, rules,
    bias_strides, wanted, dout_stride, q_stride, out_stride,
):  # fmt: skip
    """Take all queries of one head, block by block, to one tile of keys."""
    once()
    width, v_width = padded(dim), padded(v_dim)
    q_block, q_t = block, offset(block, BLOCK * width)
    dout_block = offset(q_t, BLOCK * width)
    dout_t = offset(dout_block, BLOCK * v_width)
    stats = offset(dout_t, BLOCK * v_width + 4 * KEYS * BLOCK + 2 * KEYS * PANEL + KEYS)
    one = real(block, 1)
    for row in range(0, seq_q, BLOCK):
        rows = min(BLOCK, seq_q - row)
        if end_seen(rules, row + rows - 1, seq_q, seq_k) <= first:
            continue
        if first_seen(rules, row, seq_q, seq_k) >= first + keys:
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
            offset(dq, row * width), dk, dv, dbias, k_tile, v_tile, block, counters, dim, v_dim,
            batch, head, heads, row, rows, first, keys, seq_q, seq_k, max_q, factor, rules,
            bias_strides, wanted,
        )  # fmt: skip


@callee
def _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, width, v_width):
    """A thread's scratch: keys, values, the gradients of both, what a block needs, counters."""
    k_tile = offset(pointer(scratch_at, wide), slot * scratch_size)
    v_tile = offset(k_tile, KEYS * width)
    dk_tile = offset(v_tile, KEYS * v_width)
    dv_tile = offset(dk_tile, KEYS * width)
    block = offset(dv_tile, KEYS * v_width)
    before = (slot + 1) * scratch_size - 2 * BLOCK
    return (
        k_tile,
        v_tile,
        dk_tile,
        dv_tile,
        block,
        pointer(scratch_at + before * size_of_wide, INTEGER),
    )


@callee
def _all_heads(
    spaces, grads, ins, kinds, sizes, strides, rules, wanted, spans, batch, kv_head, part, first,
    keys, sign, factor,
):  # fmt: skip
    """Take all query heads that share a tile of keys to it."""
    once()
    k_tile, v_tile, dk_tile, dv_tile, block, counters = spaces
    dq_at, _, _, dbias_at = grads
    dout_at, dlse_at, q_at, k_at, v_at, out_at, highest_at, total_at = ins
    kind, wide, _ = kinds
    _, heads, kv_heads, max_q, _, dim, v_dim, _, _, _ = sizes
    _, _, dout_strides, q_strides, k_strides, v_strides = strides[:6]
    out_strides, row_strides, dbias_strides, dq_strides = strides[6:]
    first_q, seq_q, first_k, seq_k = spans
    width, v_width, group = padded(dim), padded(v_dim), heads // kv_heads
    mask_at, mask_strides, padding = rules[MASK]
    one, step = real(wide, 1), mask_strides[3]
    k = offset(pointer(k_at, kind), place_of(k_strides, batch, kv_head, first_k + first))
    v = offset(pointer(v_at, kind), place_of(v_strides, batch, kv_head, first_k + first))
    for head in range(kv_head * group, (kv_head + 1) * group):
        seen = mask_at + place_of(mask_strides, batch, head, 0) + first * step
        seen = seen if padding else 0
        read_tile(k_tile, width, k, k_strides[2], keys, dim, one, seen, step)
        read_tile(v_tile, v_width, v, v_strides[2], keys, v_dim, one, seen, step)
        sums = part * dq_strides[0] + place_of(dq_strides[1:], batch, head, first_q)
        place = place_of(row_strides, batch, head, first_q)
        _one_head(
            offset(pointer(dq_at, wide), sums), dk_tile, dv_tile,
            offset(pointer(dbias_at, wide), place_of(dbias_strides, batch, head, 0)),
            k_tile, v_tile, block, counters,
            offset(pointer(dout_at, kind), place_of(dout_strides, batch, head, first_q)),
            offset(pointer(dlse_at, wide), place), dlse_at != 0,
            offset(pointer(q_at, kind), place_of(q_strides, batch, head, first_q)),
            offset(pointer(out_at, kind), place_of(out_strides, batch, head, first_q)),
            offset(pointer(highest_at, wide), place), offset(pointer(total_at, wide), place),
            dim, v_dim, batch, head, heads, first, keys, seq_q, seq_k, max_q, sign, factor, rules,
            dbias_strides, wanted, dout_strides[2], q_strides[2], out_strides[2],
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
    kind, wide, size_of_wide = kinds
    _, _, kv_heads, max_q, max_k, dim, v_dim, parts, at_once, heads_at_once = sizes
    dk_strides, dv_strides = strides[:2]
    width, v_width = padded(dim), padded(v_dim)
    factor, sign = (real(wide, factors[0]), real(wide, factors[1])), real(wide, sign)
    spaces = _spaces(scratch_at, slot, scratch_size, wide, size_of_wide, width, v_width)
    _, _, dk_tile, dv_tile, _, _ = spaces

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
            fill(dk_tile, KEYS * (width + v_width))
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


@Kernel
def differentiate_sinks(
    head, dsinks_at, sinks_at, ins, kinds, sizes, strides, row_strides, ends, factors
):
    """dsink = -sum(exp(sink - lse) delta) over the rows of a head."""
    dout_at, dlse_at, out_at, highest_at, total_at = ins
    kind, wide, sink_kind = kinds
    batches, max_q, v_dim = sizes
    dout_strides, out_strides = strides
    sink = np.float64(load(pointer(sinks_at, sink_kind), head))
    main, rest = factors
    found = 0.0
    for batch in range(batches):
        first, rows = span_of(ends, batch, max_q)
        for i in range(rows):
            place = place_of(row_strides, batch, head, first + i)
            total = np.float64(load(pointer(total_at, wide), place))
            if total == 0.0:
                continue
            x = offset(pointer(dout_at, kind), place_of(dout_strides, batch, head, first + i))
            y = offset(pointer(out_at, kind), place_of(out_strides, batch, head, first + i))
            delta = 0.0
            for j in range(v_dim):
                delta += np.float64(load(x, j)) * np.float64(load(y, j))
            if dlse_at:
                delta -= np.float64(load(pointer(dlse_at, wide), place))
            highest = np.float64(load(pointer(highest_at, wide), place))
            found -= 2.0 ** (sink * main + sink * rest - highest) / total * delta
    store(pointer(dsinks_at, sink_kind), head, real(kind, found))
