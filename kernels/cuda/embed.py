"""Embedding in CUDA C++: a warp or a block a row, 16-byte accesses where the rows are aligned.

Backward holds no tensor of the size of dy: rows are walked by id, in chunks, and what a run of one
id leaves of several is joined after.
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


def embed_norm_backward(dy: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [rows, cols], tables and ids, weight [cols], mean, rstd [rows], dropout, what is wanted
    -> the means of g and g * xhat [rows], dweight, dbias [cols or 0]."""
    tables, (weight, mean, rstd), dropout = arguments[:8], arguments[8:11], arguments[11:-2]
    rows, cols = dy.shape
    wanted = arguments[-2:]
    g_mean, dot_mean = torch.empty_like(mean), torch.empty_like(mean)
    dweight, dbias = (weight.new_empty(cols if want else 0) for want in wanted)
    parts, sums = rows, (None, None)
    if any(wanted):
        parts = parts_for(rows, cols)
        sums = dy.new_empty(2, parts, cols, dtype=torch.float32)
    _cuda.embed_norm_backward(
        address(g_mean), address(dot_mean), address(dweight), address(dbias), *map(address, sums),
        address(dy), *_where(*tables), address(weight), address(mean), address(rstd),
        *draw(*dropout), rows, cols, dy.stride(0), parts,
        DTYPES[dy.dtype], DTYPES[weight.dtype], stream(dy),
    )  # fmt: skip
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
    chunk_rows = max(isqrt(rows // JOINED_AT_ONCE), 1)
    chunks = -(-rows // chunk_rows)
    parts = dy.new_empty(chunks, 2, cols, dtype=torch.float32)
    _cuda.embed_table_backward(
        address(dtable), address(parts), address(dy), address(keys), address(order),
        period, len(dtable), padding, chunk_rows, chunks, *_where(*tables), *map(address, norm),
        *draw(*dropout), rows, cols, dy.stride(0),
        DTYPES[dy.dtype], DTYPES[(dy if norm[0] is None else norm[0]).dtype], stream(dy),
    )  # fmt: skip
    return dtable
