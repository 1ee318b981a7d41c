"""What a row is looked up by, and which of its columns dropout keeps."""

import triton
import triton.language as tl

from tilewise.kernels.triton._philox import keep, philox_words

WORDS = 1 << 32


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


@triton.jit
def dropped(
    x, seeds_ptr, offsets_ptr, seed, offset, threshold, scale, row, start,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`x`, columns `start` to `start` + BLOCK - 1 of a row, where dropout keeps it, scaled."""
    place = row
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + row * SEED_STRIDE)
        place = row * (1 - SEED_STRIDE)  # with one seed a row, a draw does not know the row
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + row * OFFSET_STRIDE)
    words = philox_words(tl.cast(seed, tl.int64), tl.cast(offset, tl.int64), place, start, BLOCK)
    return tl.where(keep(words, threshold), x * scale, 0.0)


def where_of(tokens, table, position_ids, position_table, segment_ids, segment_table, *periods):
    """What a kernel is given: for each table ids, rows, how many, how far apart, the turn."""
    ids, tables = (tokens, position_ids, segment_ids), (table, position_table, segment_table)
    turns = (len(tokens), *periods)
    return [
        x
        for i, t, period in zip(ids, tables, turns, strict=True)
        for x in ((None, None, 0, 0, 1) if t is None else (i, t, len(t), t.stride(0), period))
    ]


def draw(dropout_p, seeds, offsets, seed, offset):
    """What a kernel is given to drop out, and its options."""
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    strides = (0 if t is None else t.ndim for t in (seeds, offsets))
    options = dict(zip(("SEED_STRIDE", "OFFSET_STRIDE"), strides, strict=True))
    return (
        (seeds, offsets, seed, offset, int(dropout_p * WORDS), scale),
        {"DROPOUT": dropout_p > 0, **options},
    )
