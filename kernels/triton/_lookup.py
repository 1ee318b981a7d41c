"""What a row is looked up by."""

import triton
import triton.language as tl


@triton.jit
def row_of(ids_ptr, table_ptr, count, stride, period, row):
    """How far the row of a table lies that `row` names, and whether there is one; if not, row 0."""
    if table_ptr is None:
        return row * 0, row >= 0
    else:
        named = row % period
        if ids_ptr is not None:
            named = tl.load(ids_ptr + named)
        there = (named >= 0) & (named < count)
        return tl.where(there, named, 0) * stride, there


@triton.jit
def gather(token_ptr, position_ptr, segment_ptr, token_at, position_at, segment_at, col, mask):
    """The sum of one row of each table, in fp32."""
    x = tl.load(token_ptr + token_at + col, mask=mask, other=0.0).to(tl.float32)
    if position_ptr is not None:
        x += tl.load(position_ptr + position_at + col, mask=mask, other=0.0).to(tl.float32)
    if segment_ptr is not None:
        x += tl.load(segment_ptr + segment_at + col, mask=mask, other=0.0).to(tl.float32)
    return x


def where_of(tokens, table, position_ids, position_table, segment_ids, segment_table, *periods):
    """What a kernel is given: for each table ids, rows, how many, how far apart, the turn."""
    ids, tables = (tokens, position_ids, segment_ids), (table, position_table, segment_table)
    turns = (len(tokens), *periods)
    return [
        x
        for i, t, period in zip(ids, tables, turns, strict=True)
        for x in ((None, None, 0, 0, 1) if t is None else (i, t, len(t), t.stride(0), period))
    ]
