"""Embedding on the CPU: the rows of the tables are added once, into a row that stays in L1.

Backward takes the gradient back to that sum, once for all tables. Then rows are walked by id, in
chunks: a run of one id within a chunk goes to the gradient at once, and what a run leaves of other
chunks is joined after.
"""

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._dropout import ANY, SCALE, draw, mark_kept
from tilewise.kernels.numba._lookup import (
    add,
    copy,
    drop,
    fill,
    gather,
    id_of,
    where_of,
)
from tilewise.kernels.numba._norm_rows import (
    add_gradients,
    row_statistics,
    write_gradient,
    write_row,
)
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._shared import (
    part_rows,
    partial_sums,
    parts_for,
    sum_parts_for,
    summed,
    thread_scratch,
    wide_dtype,
)
from tilewise.kernels.numba._simd import (
    INTEGER,
    address,
    kind,
    load,
    offset,
    pointer,
    real,
    store,
)
from tilewise.kernels.numba._stream import finish_writes, streamed

# --- Forward.


@callee
def _normalise(y, x, mean, rstd, weight_at, bias_at, weight_kind, cols, past_caches):
    weight, bias, zero = pointer(weight_at, weight_kind), pointer(bias_at, weight_kind), real(x, 0)
    if bias_at:
        write_row(y, x, weight, bias, mean, rstd, zero, cols, None, past_caches)
    else:
        write_row(y, x, weight, None, mean, rstd, zero, cols, None, past_caches)


@Kernel
def _forward(
    part, y_at, mean_at, rstd_at, scratch_at, where, weight_at, bias_at, dropout,
    kind, wide, weight_kind, rows, cols, stride, parts, eps, past_caches,
):  # fmt: skip
    x = offset(pointer(scratch_at, wide), 2 * part * stride)
    factors = offset(x, stride)
    dropping = dropout[ANY]
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        y = offset(pointer(y_at, kind), i * cols)
        if weight_at:
            there = gather(x, i, where, kind, cols)
            mean, rstd = real(x, np.nan), real(x, np.nan)
            if there:
                mean, rstd = row_statistics(x, cols, eps, x)
            store(pointer(mean_at, wide), i, mean)
            store(pointer(rstd_at, wide), i, rstd)
            if dropping:
                _normalise(x, x, mean, rstd, weight_at, bias_at, weight_kind, cols, False)
            elif there:
                _normalise(y, x, mean, rstd, weight_at, bias_at, weight_kind, cols, past_caches)
        elif dropping:
            there = gather(x, i, where, kind, cols)
        else:
            there = gather(y, i, where, kind, cols)
        if dropping:
            if not there:
                fill(x, real(x, np.nan), cols)
            mark_kept(factors, 0, cols, i, dropout, dropout[SCALE])
            drop(y, x, factors, cols)
        elif not there:
            fill(y, real(x, np.nan), cols)
    if past_caches:
        finish_writes()


# --- Backward, of the norm and the dropout.


@callee
def _norm_gradient(dx, dy, x, dweight, dbias, mean, rstd, weight, sums, cols, past_caches):
    """dx, if it is wanted, of what was looked up, dy being of what was normalised; adds to the sums
    over rows where `sums`."""
    numbers = mean, rstd, real(x, 0)
    if sums:
        ins = dy, x, weight, dweight, dbias
        g_sum, dot = add_gradients((dweight, dbias), ins, numbers, cols)
    else:
        g_sum, dot = add_gradients((None, None), (dy, x, weight, None, None), numbers, cols)
    if dx is not None:
        count = real(x, cols)
        numbers = mean, rstd, g_sum / count, dot / count, real(x, 0)
        write_gradient((None, dx), (dy, x, None, weight, None), numbers, cols, past_caches)


@Kernel
def _rows_backward(
    part, dx_at, dweight_at, dbias_at, dy_at, scratch_at, where, weight_at, mean_at, rstd_at,
    dropout, kind, dx_kind, wide, weight_kind,
    rows, cols, dy_stride, sum_stride, stride, parts, past_caches,
):  # fmt: skip
    x = offset(pointer(scratch_at, wide), 2 * part * stride)
    d = offset(x, stride)
    weight = pointer(weight_at, weight_kind)
    dweight = offset(pointer(dweight_at, wide), part * sum_stride)
    dbias = offset(pointer(dbias_at, wide), part * sum_stride)
    dropping, sums = dropout[ANY], dweight_at != 0
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        dx = offset(pointer(dx_at, dx_kind), i * cols)
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        if dropping:
            mark_kept(d, 0, cols, i, dropout, dropout[SCALE])
        if not gather(x, i, where, kind, cols):
            if dx_at is not None:
                fill(dx, real(x, 0), cols)
        elif weight_at:
            mean, rstd = load(pointer(mean_at, wide), i), load(pointer(rstd_at, wide), i)
            if dropping:
                drop(d, dy, d, cols)
                _norm_gradient(
                    dx, d, x, dweight, dbias, mean, rstd, weight, sums, cols, past_caches
                )
            else:
                _norm_gradient(
                    dx, dy, x, dweight, dbias, mean, rstd, weight, sums, cols, past_caches
                )
        elif dx_at is not None:
            drop(dx, dy, d, cols)
    if past_caches:
        finish_writes()


# --- Backward, of the tables.


@callee
def _collect(out, total, d, added, alone, cols):
    """Add a row to those of its id, or write it at once if it is the only one."""
    if added:
        add(total, d, cols)
    elif alone:
        copy(out, d, cols)
    else:
        copy(total, d, cols)


@callee
def _key(k, keys_at, repeats):
    """The id of the k-th row in the order of ids; those of all turns of one id stand together."""
    turn = k // repeats
    return load(pointer(keys_at, INTEGER), turn) if keys_at else turn


@callee
def _walk(chunk, total, dtable_at, parts, dx_at, runs, where, kind, dx_kind, sizes):
    token, position, segment = where
    rows, cols, dx_stride, chunk_rows = sizes
    keys_at, order_at, period, repeats, table_rows, padding = runs
    first, last = chunk * chunk_rows, min(chunk * chunk_rows + chunk_rows, rows)
    key = _key(first, keys_at, repeats)
    began_before = first > 0 and _key(first - 1, keys_at, repeats) == key
    added = 0
    for k in range(first, last):
        turn = k // repeats
        at = load(pointer(order_at, INTEGER), turn) if order_at else turn
        i = (k - turn * repeats) * period + at
        ends = k + 1 == rows or _key(k + 1, keys_at, repeats) != key
        counts = 0 <= key < table_rows and key != padding
        out = offset(pointer(dtable_at, kind), key * cols)
        there = id_of(i, token) >= 0 and id_of(i, position) >= 0 and id_of(i, segment) >= 0
        if counts and there:
            dx = offset(pointer(dx_at, dx_kind), i * dx_stride)
            _collect(out, total, dx, added, ends and not began_before, cols)
            added += 1
        if not ends and k + 1 < last:
            continue
        if counts and (began_before or not ends):  # joined later
            if added == 0:
                fill(total, real(total, 0), cols)
            copy(offset(parts, (2 * chunk + (0 if began_before else 1)) * cols), total, cols)
        elif added > 1:
            copy(out, total, cols)
        began_before, added = False, 0
        if k + 1 < last:
            key = _key(k + 1, keys_at, repeats)


@Kernel
def _table_backward(
    task, dtable_at, parts_at, dx_at, counter_at, scratch_at, runs, where, kind, dx_kind, wide,
    sizes, chunks, stride,
):  # fmt: skip
    total = offset(pointer(scratch_at, wide), task * stride)
    parts = pointer(parts_at, wide)
    chunk = take(counter_at)
    while chunk < chunks:
        _walk(chunk, total, dtable_at, parts, dx_at, runs, where, kind, dx_kind, sizes)
        chunk = take(counter_at)


@Kernel
def _join(chunk, dtable_at, parts_at, runs, kind, wide, cols, rows, chunk_rows, chunks):
    """Add up a run that began in this chunk and goes on in others."""
    keys_at, _, _, repeats, table_rows, padding = runs
    following = (chunk + 1) * chunk_rows
    if following >= rows:
        return
    key = _key(following - 1, keys_at, repeats)
    first = chunk * chunk_rows
    began_before = first > 0 and _key(first - 1, keys_at, repeats) == key
    goes_on = _key(following, keys_at, repeats) == key
    if began_before or not goes_on or key < 0 or key >= table_rows or key == padding:
        return
    parts = pointer(parts_at, wide)
    total = offset(parts, (2 * chunk + 1) * cols)
    other = chunk + 1
    while other < chunks and _key(other * chunk_rows, keys_at, repeats) == key:
        add(total, offset(parts, 2 * other * cols), cols)
        other += 1
    copy(offset(pointer(dtable_at, kind), key * cols), total, cols)


# --- Launches.


def embed_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Tables and ids, weight, bias [cols], eps, dropout -> y [rows, cols], mean, rstd [rows or 0],
    fp32 or fp64."""
    tables, (weight, bias, eps), dropout = arguments[:8], arguments[8:11], arguments[11:]
    ids, table = tables[:2]
    rows, cols = len(ids), table.shape[1]
    y = table.new_empty(rows, cols)
    wide = wide_dtype(table.dtype)
    mean = table.new_empty(0 if weight is None else rows, dtype=wide)
    rstd = torch.empty_like(mean)
    parts = parts_for(rows)
    scratch = part_rows(table, 2 * parts, wide)
    _forward(
        parts, y.numel(), address(y), address(mean), address(rstd), address(scratch),
        where_of(*tables), address(weight), address(bias), draw(*dropout),
        kind(table), kind(rstd), kind(table if weight is None else weight),
        rows, cols, scratch.shape[1], parts, eps, streamed(y),
    )  # fmt: skip
    return y, mean, rstd


def embed_rows_backward(dy: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, cols], tables and ids, weight [cols] or None, mean, rstd [rows or 0], dropout,
    what is wanted -> dx [rows, cols] of the sum of the tables' rows, fp32 or fp64, dweight, dbias
    [cols]; empty where not wanted."""
    tables, (weight, mean, rstd), dropout = arguments[:8], arguments[8:11], arguments[11:-3]
    want_dx, *wanted = arguments[-3:]
    rows, cols = dy.shape
    dx = dy.new_empty((rows, cols) if want_dx else 0, dtype=mean.dtype)
    parts = sum_parts_for(rows, cols)
    scratch = part_rows(dy, 2 * parts, mean.dtype)
    sums = [partial_sums(dy, parts if any(wanted) else 0, mean.dtype) for _ in range(2)]
    like = dy if weight is None else weight
    _rows_backward(
        parts, 2 * dy.numel(), dx.data_ptr() if want_dx else None, *map(address, sums),
        address(dy), address(scratch), where_of(*tables), address(weight), address(mean),
        address(rstd), draw(*dropout), kind(dy), kind(dx) if want_dx else None, kind(mean),
        kind(like), rows, cols, dy.stride(0), sums[0].shape[1], scratch.shape[1], parts,
        want_dx and streamed(dx),
    )  # fmt: skip
    dweight, dbias = (
        summed(part, like) if want else like.new_empty(0)
        for part, want in zip(sums, wanted, strict=True)
    )
    return dx, dweight, dbias


def embed_table_backward(
    dx: Tensor,
    keys: Tensor | None,
    order: Tensor | None,
    period: int,
    which: int,
    padding: int,
    *tables,
) -> Tensor:
    """dx [rows, cols], keys and their order [period], tables and ids -> the gradient of the table
    that is `which`."""
    rows, cols = dx.shape
    table = tables[2 * which + 1]
    dtable = table.new_zeros(table.shape)
    chunk_rows = isqrt(rows - 1) + 1
    chunks = -(-rows // chunk_rows)
    parts = dx.new_empty(chunks, 2, cols, dtype=wide_dtype(dx.dtype))
    counter, scratch, stride = thread_scratch(parts, cols)
    runs = (address(keys), address(order), period, rows // period, len(dtable), padding)
    _table_backward(
        torch.get_num_threads(), 2 * dx.numel(), address(dtable), address(parts), address(dx),
        address(counter), address(scratch), runs, where_of(*tables), kind(dtable), kind(dx),
        kind(parts), (rows, cols, dx.stride(0), chunk_rows), chunks, stride,
    )  # fmt: skip
    _join(
        chunks, parts.numel(), address(dtable), address(parts), runs, kind(dtable), kind(parts),
        cols, rows, chunk_rows, chunks,
    )  # fmt: skip
    return dtable
