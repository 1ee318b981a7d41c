"""What a row is looked up by, and what a row in L1 goes through."""

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import INTEGER, address, load, offset, pointer, real, store


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
