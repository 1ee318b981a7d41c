"""What a row is looked up by, and what a row in L1 goes through."""

import numpy as np

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._philox import keep, philox
from tilewise.kernels.numba._simd import address, load, offset, pointer, real, store

INTEGER = np.int64(0)
WORDS = 1 << 32


@callee
def id_of(i, table):
    """The row of a table that row `i` names, -1 if there is none such; 0 of no table."""
    ids_at, table_at, count, _, period = table
    if table_at == 0:
        return 0
    at = i % period
    row = load(pointer(ids_at, INTEGER), at) if ids_at else at
    return row if 0 <= row < count else -1


@callee
def gather(x, i, where, kind, cols):
    """x = the sum of the rows that row `i` names; whether there are all of them."""
    token, position, segment = where
    a, b, c = id_of(i, token), id_of(i, position), id_of(i, segment)
    if a < 0 or b < 0 or c < 0:
        return False
    tokens = offset(pointer(token[1], kind), a * token[3])
    positions = offset(pointer(position[1], kind), b * position[3])
    segments = offset(pointer(segment[1], kind), c * segment[3])
    if position[1] and segment[1]:
        for j in range(cols):
            store(x, j, load(tokens, j) + load(positions, j) + load(segments, j))
    elif position[1]:
        for j in range(cols):
            store(x, j, load(tokens, j) + load(positions, j))
    elif segment[1]:
        for j in range(cols):
            store(x, j, load(tokens, j) + load(segments, j))
    else:
        for j in range(cols):
            store(x, j, load(tokens, j))
    return True


@callee
def keep_row(factors, i, dropout, cols):
    """1 / (1 - p) where dropout keeps a column of row `i`, else 0."""
    _, threshold, scale, seeds_at, offsets_at, seed_step, offset_step, seed, place = dropout
    if seeds_at:
        seed = load(pointer(seeds_at, INTEGER), i * seed_step)
    if offsets_at:
        place = load(pointer(offsets_at, INTEGER), i * offset_step)
    row = 0 if seed_step else i
    kept, none = real(factors, scale), real(factors, 0)
    for group in range(cols // 4):
        a, b, c, d = philox(seed, place, row, group)
        store(factors, 4 * group, kept if keep(a, threshold) else none)
        store(factors, 4 * group + 1, kept if keep(b, threshold) else none)
        store(factors, 4 * group + 2, kept if keep(c, threshold) else none)
        store(factors, 4 * group + 3, kept if keep(d, threshold) else none)
    if cols % 4:
        words = philox(seed, place, row, cols // 4)
        for j in range(cols % 4):
            store(factors, cols // 4 * 4 + j, kept if keep(words[j], threshold) else none)


@callee
def drop(out, x, factors, cols):
    """out = x * factors, 0 where that is 0 whatever x is."""
    none = real(factors, 0)
    for j in range(cols):
        factor = load(factors, j)
        kept = load(x, j) * factor
        store(out, j, none if factor == none else kept)


@callee
def copy(out, x, cols):
    for j in range(cols):
        store(out, j, load(x, j))


@callee
def add(out, x, cols):
    for j in range(cols):
        store(out, j, load(out, j) + load(x, j))


@callee
def fill(x, value, cols):
    for j in range(cols):
        store(x, j, value)


def where_of(tokens, table, position_ids, position_table, segment_ids, segment_table, *periods):
    """For each table the addresses of ids and rows, how many rows and how far apart, the turn."""
    ids, tables = (tokens, position_ids, segment_ids), (table, position_table, segment_table)
    return tuple(
        (address(i), 0, 0, 0, 1) if t is None else (address(i), address(t), len(t), t.stride(0), p)
        for i, t, p in zip(ids, tables, (len(tokens), *periods), strict=True)
    )


def draw(dropout_p, seeds, offsets, seed, place):
    """Whether there is any dropout, threshold and scale, then what draws the numbers."""
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    steps = (0 if t is None else t.ndim for t in (seeds, offsets))
    return (
        int(dropout_p > 0), int(dropout_p * WORDS), scale, address(seeds), address(offsets),
        *steps, seed, place,
    )  # fmt: skip
