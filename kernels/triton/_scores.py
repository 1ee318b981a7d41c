"""Scores of a tile of rows, with what hides some of them: bias, mask, softcap, causal limit."""

import triton
import triton.language as tl

from tilewise.kernels.triton._activations import tanh


@triton.jit
def _query(row, queries):
    """The place of a row among its queries; there are fewer than 2^31 rows, as of programs."""
    return row.to(tl.int32) % queries


@triton.jit
def row_start(row, heads, queries, batch_stride, head_stride, query_stride):
    """Where in a [batch, heads, queries, cols] the row with this number begins, in elements."""
    head = row.to(tl.int32) // queries
    batch, head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query = _query(row, queries).to(tl.int64)
    return batch * batch_stride + head * head_stride + query * query_stride


@triton.jit
def columns_seen(row, cols, queries):
    """How many columns a row sees that sees no later ones."""
    return tl.minimum(tl.maximum(_query(row, queries) + cols - queries + 1, 0), cols)


@triton.jit
def _readable(row, col, rows, cols, queries, CAUSAL: tl.constexpr):
    """What is read: in eights, so that accesses stay wide where causality ends a row."""
    readable = (row < rows)[:, None] & (col < cols)[None, :]
    if CAUSAL:
        eights = (columns_seen(row, cols, queries) + 7) // 8 * 8
        readable &= col[None, :] < eights[:, None]
    return readable


@triton.jit
def read(ptr, row, col, stride, readable, other):
    place = (row * stride)[:, None] + col[None, :]
    return tl.load(ptr + place, mask=readable, other=other).to(tl.float32)


@triton.jit
def shown(
    value, hidden, mask_ptr, starts, col_stride, row, col, readable, cols, queries,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """`value`, or `hidden` where causality or the mask hides a column."""
    if CAUSAL:
        seen = columns_seen(row, cols, queries)
        value = tl.where(col[None, :] < seen[:, None], value, hidden)
    if MASK:
        place = starts[:, None] + (col * col_stride)[None, :]
        shown = tl.load(mask_ptr + place, mask=readable, other=0) != 0
        value = tl.where(shown, value, hidden)
    return value


@triton.jit
def scores(
    x_ptr, bias_ptr, mask_ptr, row, col, bias_starts, mask_starts,
    rows, cols, queries, x_stride, bias_col, mask_col, scale, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Those of rows `row` and columns `col`, -inf where they are hidden."""
    readable = _readable(row, col, rows, cols, queries, CAUSAL)
    s = scale * read(x_ptr, row, col, x_stride, readable, 0.0)
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    if BIAS:
        place = bias_starts[:, None] + (col * bias_col)[None, :]
        s += tl.load(bias_ptr + place, mask=readable, other=0.0).to(tl.float32)
    s = tl.where(readable, s, float("-inf"))
    return shown(
        s, float("-inf"), mask_ptr, mask_starts, mask_col, row, col, readable, cols, queries,
        MASK, CAUSAL,
    )  # fmt: skip
