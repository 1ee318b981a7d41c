"""Embedding on the CPU: the rows of the tables are added once, into a row that stays in L1.

Backward never holds a tensor of the size of dy. Rows are walked by id, in chunks: a run of one id
within a chunk goes to the gradient at once, and what a run leaves of other chunks is joined after.
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
from tilewise.kernels.numba._norm_rows import add_gradients, row_statistics, write_row
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._shared import (
    partial_sums,
    parts_for,
    sum_parts_for,
    summed,
    thread_scratch,
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


# --- Backward.


@callee
def _norm_row(dweight, dbias, d, x, mean, rstd, weight, sums, cols):
    """The sums over a row of g and g * xhat; adds to those over rows where `sums`."""
    numbers = mean, rstd, real(x, 0)
    if sums:
        ins = d, x, weight, dweight, dbias
        return add_gradients((dweight, dbias), ins, numbers, cols)
    return add_gradients((None, None), (d, x, weight, None, None), numbers, cols)


@Kernel
def _norm_backward(
    part, g_mean_at, dot_mean_at, dweight_at, dbias_at, dy_at, scratch_at, where, weight_at,
    mean_at, rstd_at, dropout, kind, wide, weight_kind,
    rows, cols, dy_stride, sum_stride, stride, parts,
):  # fmt: skip
    # the means of g and of g * xhat, with g = dy * weight and dy that of what was dropped out of
    x = offset(pointer(scratch_at, wide), 2 * part * stride)
    d = offset(x, stride)
    weight = pointer(weight_at, weight_kind)
    dweight = offset(pointer(dweight_at, wide), part * sum_stride)
    dbias = offset(pointer(dbias_at, wide), part * sum_stride)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        g_sum, dot = real(x, 0), real(x, 0)
        if gather(x, i, where, kind, cols):
            dy = offset(pointer(dy_at, kind), i * dy_stride)
            mean, rstd = load(pointer(mean_at, wide), i), load(pointer(rstd_at, wide), i)
            if dropout[ANY]:
                mark_kept(d, 0, cols, i, dropout, dropout[SCALE])
                drop(d, dy, d, cols)
                g_sum, dot = _norm_row(
                    dweight, dbias, d, x, mean, rstd, weight, dweight_at != 0, cols
                )
            else:
                g_sum, dot = _norm_row(
                    dweight, dbias, dy, x, mean, rstd, weight, dweight_at != 0, cols
                )
        store(pointer(g_mean_at, wide), i, g_sum / real(x, cols))
        store(pointer(dot_mean_at, wide), i, dot / real(x, cols))


@callee
def _gradient(out, d, x, mean, rstd, g_mean, dot_mean, weight, cols):
    for j in range(cols):
        g, xhat = load(d, j) * real(x, load(weight, j)), (load(x, j) - mean) * rstd
        store(out, j, rstd * (g - g_mean - xhat * dot_mean))


@callee
def _row_gradient(d, x, i, dy, where, norm, dropout, kinds, cols):
    """d = the gradient of what was looked up for row `i`, where it is not dy itself."""
    kind, wide, weight_kind = kinds
    weight_at, mean_at, rstd_at, g_mean_at, dot_mean_at = norm
    if dropout[ANY]:
        mark_kept(d, 0, cols, i, dropout, dropout[SCALE])
        drop(d, dy, d, cols)
    if weight_at:
        gather(x, i, where, kind, cols)
        weight = pointer(weight_at, weight_kind)
        mean, rstd = load(pointer(mean_at, wide), i), load(pointer(rstd_at, wide), i)
        g_mean, dot_mean = load(pointer(g_mean_at, wide), i), load(pointer(dot_mean_at, wide), i)
        if dropout[ANY]:
            _gradient(d, d, x, mean, rstd, g_mean, dot_mean, weight, cols)
        else:
            _gradient(d, dy, x, mean, rstd, g_mean, dot_mean, weight, cols)


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
def _walk(chunk, total, d, x, dtable_at, parts, dy_at, runs, where, norm, dropout, kinds, sizes):
    kind = kinds[0]
    token, position, segment = where
    rows, cols, dy_stride, chunk_rows = sizes
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
        if counts:
            dy = offset(pointer(dy_at, kind), i * dy_stride)
            if id_of(i, token) >= 0 and id_of(i, position) >= 0 and id_of(i, segment) >= 0:
                alone = ends and not began_before
                if norm[0] or dropout[ANY]:
                    _row_gradient(d, x, i, dy, where, norm, dropout, kinds, cols)
                    _collect(out, total, d, added, alone, cols)
                else:
                    _collect(out, total, dy, added, alone, cols)
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
    task, dtable_at, parts_at, dy_at, counter_at, scratch_at, runs, where, norm, dropout,
    kinds, sizes, chunks, stride,
):  # fmt: skip
    wide = kinds[1]
    total = offset(pointer(scratch_at, wide), 3 * task * stride)
    d, x = offset(total, stride), offset(total, 2 * stride)
    parts = pointer(parts_at, wide)
    chunk = take(counter_at)
    while chunk < chunks:
        _walk(chunk, total, d, x, dtable_at, parts, dy_at, runs, where, norm, dropout, kinds, sizes)
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
    wide = torch.promote_types(table.dtype, torch.float32)
    mean = table.new_empty(0 if weight is None else rows, dtype=wide)
    rstd = torch.empty_like(mean)
    parts = parts_for(rows)
    scratch = partial_sums(table, 2 * parts, wide)
    _forward(
        parts, y.numel(), address(y), address(mean), address(rstd), address(scratch),
        where_of(*tables), address(weight), address(bias), draw(*dropout),
        kind(table), kind(rstd), kind(table if weight is None else weight),
        rows, cols, scratch.shape[1], parts, eps, streamed(y),
    )  # fmt: skip
    return y, mean, rstd


def embed_norm_backward(dy: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [rows, cols], tables and ids, weight [cols], mean, rstd [rows], dropout, what is wanted
    -> the means of g and g * xhat [rows], dweight, dbias [cols or 0]."""
    tables, (weight, mean, rstd), dropout = arguments[:8], arguments[8:11], arguments[11:-2]
    rows, cols = dy.shape
    wanted = arguments[-2:]
    g_mean, dot_mean = torch.empty_like(mean), torch.empty_like(mean)
    parts = sum_parts_for(rows, cols)
    scratch = partial_sums(dy, 2 * parts, mean.dtype)
    sums = [partial_sums(dy, parts if any(wanted) else 0, mean.dtype) for _ in range(2)]
    _norm_backward(
        parts, 2 * dy.numel(), address(g_mean), address(dot_mean), *map(address, sums),
        address(dy), address(scratch), where_of(*tables), address(weight), address(mean),
        address(rstd), draw(*dropout), kind(dy), kind(mean), kind(weight),
        rows, cols, dy.stride(0), sums[0].shape[1], scratch.shape[1], parts,
    )  # fmt: skip
    dweight, dbias = (
        summed(part, weight) if want else weight.new_empty(0)
        for part, want in zip(sums, wanted, strict=True)
    )
    return g_mean, dot_mean, dweight, dbias


def embed_table_backward(
    dy: Tensor,
    keys: Tensor | None,
    order: Tensor | None,
    period: int,
    which: int,
    padding: int,
    *arguments,
) -> Tensor:
    """dy [rows, cols], keys and their order [period], tables and ids, weight [cols], mean, rstd,
    g_mean, dot_mean [rows], dropout -> the gradient of the table that is `which`."""
    tables, norm, dropout = arguments[:8], arguments[8:13], arguments[13:]
    rows, cols = dy.shape
    dtable = dy.new_zeros(tables[2 * which + 1].shape)
    wide = dy.new_empty(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    chunk_rows = isqrt(rows - 1) + 1
    chunks = -(-rows // chunk_rows)
    parts = wide.new_empty(chunks, 2, cols)
    counter, scratch, elements = thread_scratch(wide, 3 * (cols + 15) // 16 * 16)
    stride = elements // 3
    runs = (address(keys), address(order), period, rows // period, len(dtable), padding)
    weight = dy if norm[0] is None else norm[0]
    _table_backward(
        torch.get_num_threads(), 2 * dy.numel(), address(dtable), address(parts), address(dy),
        address(counter), address(scratch), runs, where_of(*tables), tuple(map(address, norm)),
        draw(*dropout), (kind(dy), kind(wide), kind(weight)),
        (rows, cols, dy.stride(0), chunk_rows), chunks, stride,
    )  # fmt: skip
    _join(
        chunks, parts.numel(), address(dtable), address(parts), runs, kind(dy), kind(wide),
        cols, rows, chunk_rows, chunks,
    )  # fmt: skip
    return dtable
