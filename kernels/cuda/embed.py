"""Embedding in CUDA C++: a warp or a block a row, 16-byte accesses where the rows are aligned.

Backward takes the gradient back to the sum of the rows, once for all tables; then rows are walked
by id, in chunks, and what a run of one id leaves of several is joined after.
"""

from math import isqrt

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, draw, parts_for, stream

# Of a run over all chunks 16 threads add up what it left, so the chunks may be that much shorter.
JOINED_AT_ONCE = 16


def _where(tokens, table, position_ids, position_table, segment_ids, segment_table, *periods):
    """For each table ids, rows, how many, how far apart, the turn."""
    ids, tables = (tokens, position_ids, segment_ids), (table, position_table, segment_table)
    turns = (len(tokens), *periods)
    return [
        x
        for i, t, period in zip(ids, tables, turns, strict=True)
        for x in (
            (0, 0, 0, 0, 1) if t is None else (address(i), address(t), len(t), t.stride(0), period)
        )
    ]


def embed_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Tables and ids, weight, bias [cols], eps, dropout -> y [rows, cols], mean, rstd [rows or 0],
    fp32."""
    tables, (weight, bias, eps), dropout = arguments[:8], arguments[8:11], arguments[11:]
    ids, table = tables[:2]
    rows, cols = len(ids), table.shape[1]
    y = table.new_empty(rows, cols)
    mean = table.new_empty(0 if weight is None else rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _cuda.embed_forward(
        address(y), address(mean), address(rstd), *_where(*tables), address(weight), address(bias),
        *draw(*dropout), rows, cols, eps,
        DTYPES[table.dtype], DTYPES[(table if weight is None else weight).dtype], stream(table),
    )  # fmt: skip
    return y, mean, rstd


def embed_rows_backward(dy: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, cols], tables and ids, weight [cols] or None, mean, rstd [rows or 0], dropout,
    what is wanted -> dx [rows, cols] of the sum of the tables' rows, fp32, dweight, dbias
    [cols]; empty where not wanted."""
    tables, (weight, mean, rstd), dropout = arguments[:8], arguments[8:11], arguments[11:-3]
    want_dx, *wanted = arguments[-3:]
    rows, cols = dy.shape
    dx = dy.new_empty((rows, cols) if want_dx else 0, dtype=torch.float32)
    like = dy if weight is None else weight
    dweight, dbias = (like.new_empty(cols if want else 0) for want in wanted)
    parts, sums = rows, (None, None)
    if any(wanted):
        parts = parts_for(rows, cols)
        sums = dy.new_empty(2, parts, cols, dtype=torch.float32)
    _cuda.embed_rows_backward(
        address(dx), address(dweight), address(dbias), *map(address, sums),
        address(dy), *_where(*tables), address(weight), address(mean), address(rstd),
        *draw(*dropout), rows, cols, dy.stride(0), parts,
        DTYPES[dy.dtype], DTYPES[like.dtype], stream(dy),
    )  # fmt: skip
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
    chunk_rows = max(isqrt(rows // JOINED_AT_ONCE), 1)
    chunks = -(-rows // chunk_rows)
    parts = dx.new_empty(chunks, 2, cols, dtype=torch.float32)
    _cuda.embed_table_backward(
        address(dtable), address(parts), address(dx), address(keys), address(order),
        period, len(dtable), padding, chunk_rows, chunks, *_where(*tables),
        rows, cols, dx.stride(0), DTYPES[table.dtype], DTYPES[dx.dtype], stream(dx),
    )  # fmt: skip
    return dtable
