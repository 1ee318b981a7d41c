"""Embedding on the GPU: one program a row, held in registers, or in blocks where it is wide.

Backward takes the gradient back to the sum of the rows, once for all tables. Then rows are walked
by id, in chunks: a run of one id within a chunk goes to the gradient at once, and what a run leaves
of other chunks is joined after.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._dropout import draw, dropped
from tilewise.kernels.triton._lookup import gather, row_of, where_of
from tilewise.kernels.triton._runs import TALL, _join_kernel, key_of
from tilewise.kernels.triton._shared import (
    MAX_PARTS,
    WIDE_ROW,
    WIDEST_BLOCK,
    launch_options,
    row_options,
)

WIDEST_WALK = 1024  # columns of a program that walks rows: 16 bytes of bf16 a thread
WIDEST_JOIN = 256

SEARCH_SPACE = {
    "_forward_kernel": {"num_warps": (1, 2, 4, 8, 16)},
    "_rows_backward_kernel": {"num_warps": (1, 2, 4, 8, 16)},
    "_table_backward_kernel": {"BLOCK": (256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
}


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _forward_kernel(
    y_ptr, mean_ptr, rstd_ptr,
    token_ids_ptr, token_ptr, tokens, token_stride, token_period,
    position_ids_ptr, position_ptr, positions, position_stride, position_period,
    segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period,
    weight_ptr, bias_ptr, seeds_ptr, offsets_ptr, seed, offset, threshold, scale, cols, eps,
    DROPOUT: tl.constexpr, SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    a, found = row_of(token_ids_ptr, token_ptr, tokens, token_stride, token_period, row)
    b, placed = row_of(
        position_ids_ptr, position_ptr, positions, position_stride, position_period, row
    )
    c, parted = row_of(segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period, row)
    there = found & placed & parted
    y = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)

    if weight_ptr is not None:
        mean = tl.sum(y) / cols
        mean += tl.sum(tl.where(mask, y - mean, 0.0)) / cols  # what rounding took of a large mean
        centred = tl.where(mask, y - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred) / cols + eps)
        y = centred * rstd * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    y = tl.where(there, y, float("nan"))
    if DROPOUT:
        y = dropped(
            y, row, 0, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
            SEED_STRIDE, OFFSET_STRIDE, BLOCK,
        )  # fmt: skip
    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _forward_wide_kernel(
    y_ptr, mean_ptr, rstd_ptr,
    token_ids_ptr, token_ptr, tokens, token_stride, token_period,
    position_ids_ptr, position_ptr, positions, position_stride, position_period,
    segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period,
    weight_ptr, bias_ptr, seeds_ptr, offsets_ptr, seed, offset, threshold, scale, cols, eps,
    DROPOUT: tl.constexpr, SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    a, found = row_of(token_ids_ptr, token_ptr, tokens, token_stride, token_period, row)
    b, placed = row_of(
        position_ids_ptr, position_ptr, positions, position_stride, position_period, row
    )
    c, parted = row_of(segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period, row)
    there = found & placed & parted
    if weight_ptr is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < cols
            total += gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
        mean = tl.sum(total) / cols
        left = tl.zeros([BLOCK], tl.float32)
        square_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < cols
            x = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
            centred = tl.where(mask, x - mean, 0.0)
            left += centred
            square_sum += centred * centred
        correction = tl.sum(left) / cols  # what rounding took from a large mean
        mean += correction
        rstd = tl.rsqrt(tl.sum(square_sum) / cols - correction * correction + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        y = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
        if weight_ptr is not None:
            y = (y - mean) * rstd * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(there, y, float("nan"))
        if DROPOUT:
            y = dropped(
                y, row, start, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
                SEED_STRIDE, OFFSET_STRIDE, BLOCK,
            )  # fmt: skip
        tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _rows_backward_kernel(
    dx_ptr, dweight_parts_ptr, dbias_parts_ptr, dy_ptr,
    token_ids_ptr, token_ptr, tokens, token_stride, token_period,
    position_ids_ptr, position_ptr, positions, position_stride, position_period,
    segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period,
    weight_ptr, mean_ptr, rstd_ptr, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
    rows, cols, dy_stride,
    DROPOUT: tl.constexpr, SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Programs (part, block of columns). With a dx and a norm a block must be a whole row.
    part = tl.cast(tl.program_id(0), tl.int64)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    mask = col < cols
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        a, found = row_of(token_ids_ptr, token_ptr, tokens, token_stride, token_period, row)
        b, placed = row_of(
            position_ids_ptr, position_ptr, positions, position_stride, position_period, row
        )
        c, parted = row_of(
            segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period, row
        )
        there = found & placed & parted
        d = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            d = dropped(
                d, row, start, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
                SEED_STRIDE, OFFSET_STRIDE, BLOCK,
            )  # fmt: skip
        d = tl.where(there, d, 0.0)
        if weight_ptr is not None:
            x = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
            rstd = tl.where(there, tl.load(rstd_ptr + row), 0.0)
            xhat = tl.where(there, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            if SUMS:
                dweight += d * xhat
                dbias += d
            if dx_ptr is not None:
                d *= weight
                through = tl.sum(d) / cols + xhat * (tl.sum(d * xhat) / cols)
                d = rstd * (d - through)
        if dx_ptr is not None:
            tl.store(dx_ptr + row * cols + col, d, mask=mask)
    if SUMS:
        tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)
        tl.store(dbias_parts_ptr + part * cols + col, dbias, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _rows_backward_wide_kernel(
    dx_ptr, dy_ptr,
    token_ids_ptr, token_ptr, tokens, token_stride, token_period,
    position_ids_ptr, position_ptr, positions, position_stride, position_period,
    segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period,
    weight_ptr, mean_ptr, rstd_ptr, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
    cols, dy_stride,
    DROPOUT: tl.constexpr, SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    a, found = row_of(token_ids_ptr, token_ptr, tokens, token_stride, token_period, row)
    b, placed = row_of(
        position_ids_ptr, position_ptr, positions, position_stride, position_period, row
    )
    c, parted = row_of(segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period, row)
    there = found & placed & parted
    if weight_ptr is not None:
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        g_sum = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < cols
            x = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
            g = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
            if DROPOUT:
                g = dropped(
                    g, row, start, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
                    SEED_STRIDE, OFFSET_STRIDE, BLOCK,
                )  # fmt: skip
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
            g_sum += g
            dot += g * ((x - mean) * rstd)
        g_mean = tl.sum(g_sum) / cols
        dot_mean = tl.sum(dot) / cols

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        d = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            d = dropped(
                d, row, start, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
                SEED_STRIDE, OFFSET_STRIDE, BLOCK,
            )  # fmt: skip
        if weight_ptr is not None:
            x = gather(token_ptr, position_ptr, segment_ptr, a, b, c, col, mask)
            weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
            d = rstd * (d * weight - g_mean - (x - mean) * rstd * dot_mean)
        tl.store(dx_ptr + row * cols + col, tl.where(there, d, 0.0), mask=mask)


@triton.jit(do_not_specialize=["padding"])
def _table_backward_kernel(
    dtable_ptr, parts_ptr, dx_ptr, keys_ptr, order_ptr,
    token_ids_ptr, token_ptr, tokens, token_stride, token_period,
    position_ids_ptr, position_ptr, positions, position_stride, position_period,
    segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period,
    rows, cols, dx_stride, period, repeats, table_rows, padding, chunk_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols

    # The k-th row in the order of ids is row `lap` * period + order[turn], its id keys[turn].
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    turn = first // repeats
    lap = first - turn * repeats
    key = key_of(keys_ptr, turn)
    before = tl.maximum(first - 1, 0) // repeats
    slot = tl.where((first > 0) & (key_of(keys_ptr, before) == key), 0, 1)  # 0: it began before
    counts = (key >= 0) & (key < table_rows) & (key != padding)
    goes_on = first < 0  # False
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(first, last):
        row = lap * period + turn
        if order_ptr is not None:
            row = lap * period + tl.load(order_ptr + turn)
        _, found = row_of(token_ids_ptr, token_ptr, tokens, token_stride, token_period, row)
        _, placed = row_of(
            position_ids_ptr, position_ptr, positions, position_stride, position_period, row
        )
        _, parted = row_of(
            segment_ids_ptr, segment_ptr, segments, segment_stride, segment_period, row
        )
        d = tl.load(dx_ptr + row * dx_stride + col, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(found & placed & parted, d, 0.0)

        lap += 1
        turn += tl.where(lap == repeats, 1, 0)
        lap = tl.where(lap == repeats, 0, lap)
        following = key_of(keys_ptr, tl.minimum(turn, (rows - 1) // repeats))
        goes_on = (k + 1 < rows) & (following == key)
        if not goes_on:
            if counts:
                if slot == 1:
                    tl.store(dtable_ptr + key * cols + col, total, mask=mask)
                else:
                    tl.store(parts_ptr + chunk * 2 * cols + col, total, mask=mask)
            total = tl.zeros([BLOCK], tl.float32)
            slot = 1
            key = following
            counts = (key >= 0) & (key < table_rows) & (key != padding)
    if goes_on & counts:
        tl.store(parts_ptr + (chunk * 2 + slot) * cols + col, total, mask=mask)


def _row(cols: int) -> dict[str, int]:
    """The options of a row in one block, of at least one group of four columns."""
    return row_options(max(cols, 16))


def embed_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Tables and ids, weight, bias [cols], eps, dropout -> y [rows, cols], mean, rstd [rows or 0],
    fp32."""
    tables, (weight, bias, eps), dropout = arguments[:8], arguments[8:11], arguments[11:]
    ids, table = tables[:2]
    rows, cols = len(ids), table.shape[1]
    y = table.new_empty(rows, cols)
    mean = table.new_empty(0 if weight is None else rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    numbers, options = draw(*dropout)
    wide = cols > WIDEST_BLOCK
    kernel, block = (_forward_wide_kernel, WIDE_ROW) if wide else (_forward_kernel, _row(cols))
    kernel[(rows,)](
        y, mean, rstd, *where_of(*tables), weight, bias, *numbers, cols, eps, **options, **block
    )
    return y, mean, rstd


def embed_rows_backward(dy: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, cols], tables and ids, weight [cols] or None, mean, rstd [rows or 0], dropout,
    what is wanted -> dx [rows, cols] of the sum of the tables' rows, fp32, dweight, dbias
    [cols]; empty where not wanted."""
    tables, norm, dropout = arguments[:8], arguments[8:11], arguments[11:-3]
    want_dx, *wanted = arguments[-3:]
    rows, cols = dy.shape
    dx = dy.new_empty((rows, cols) if want_dx else 0, dtype=torch.float32)
    sums = any(wanted)
    count = min(rows, MAX_PARTS) if sums else rows
    parts = [dy.new_empty(count, cols, dtype=torch.float32) if sums else None for _ in wanted]
    numbers, options = draw(*dropout)
    given = dy, *where_of(*tables), *norm, *numbers
    wide = cols > WIDEST_BLOCK
    if wide and want_dx:
        _rows_backward_wide_kernel[(rows,)](dx, *given, cols, dy.stride(0), **options, **WIDE_ROW)
    if not wide or sums:
        block = WIDE_ROW if wide else _row(cols)
        _rows_backward_kernel[(count, triton.cdiv(cols, block["BLOCK"]))](
            dx if want_dx and not wide else None, *parts, *given,
            rows, cols, dy.stride(0), SUMS=sums, **options, **block,
        )  # fmt: skip
    like = dy if norm[0] is None else norm[0]
    dweight, dbias = (
        part.sum(0).to(like.dtype) if want else like.new_empty(0)
        for part, want in zip(parts, wanted, strict=True)
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
    chunk_rows = max(isqrt(rows // TALL), 1)
    chunks = triton.cdiv(rows, chunk_rows)
    parts = dx.new_empty(chunks, 2, cols, dtype=torch.float32)
    block = min(max(triton.next_power_of_2(cols), 16), WIDEST_WALK)
    repeats = rows // period
    _table_backward_kernel[(chunks, triton.cdiv(cols, block))](
        dtable, parts, dx, keys, order, *where_of(*tables),
        rows, cols, dx.stride(0), period, repeats, len(dtable), padding, chunk_rows,
        BLOCK=block, **launch_options(max(block // 256, 1)),
    )  # fmt: skip
    block = min(block, WIDEST_JOIN)
    _join_kernel[(chunks, triton.cdiv(cols, block))](
        dtable, parts, keys, rows, cols, repeats, len(dtable), padding, chunk_rows, chunks,
        TALL=TALL, BLOCK=block, **launch_options(4),
    )  # fmt: skip
    return dtable
