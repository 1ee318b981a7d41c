"""New keys and values into a cache, each to its place, the keys turned on the way."""

import math

import numpy as np

from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._simd import load, offset, pointer, real, store
from tilewise.kernels.numba._turn import turn_pairs

NUMBER = np.int32(0)


@callee
def place_in(cache, batch, position):
    """The page, or the sequence itself without pages, and the place in it; a page of -1 where there
    is none."""
    table_at, table_stride, page_size, pages, capacity = cache
    if position < 0 or position >= capacity:
        return np.int64(-1), np.int64(0)
    if table_at == 0:
        return np.int64(batch), np.int64(position)
    table = pointer(table_at, NUMBER)
    page = np.int64(load(table, batch * table_stride + position // page_size))
    return page if page < pages else np.int64(-1), np.int64(position % page_size)


@callee
def _turn_row(y, x, kind, cos, sin, half, interleaved):
    if interleaved:
        for j in range(half):
            c, s = real(kind, load(cos, j)), real(kind, load(sin, j))
            u, v = load(x, 2 * j), load(x, 2 * j + 1)
            store(y, 2 * j, u * c - v * s)
            store(y, 2 * j + 1, v * c + u * s)
    else:
        outs, ins = (y, offset(y, half)), (x, offset(x, half), cos, sin)
        turn_pairs(outs, ins, (real(kind, 1),), half, False)


@callee
def _copy(y, x, count):
    for j in range(count):
        store(y, j, load(x, j))


@Kernel
def append(part, parts, caches, ins, tables, kinds, sizes, strides, cache, interleaved):
    # Strides are of [batch or page, head, position] of the caches and of [batch, head, token].
    k_cache_at, v_cache_at = caches
    k_at, v_at, before_at = ins
    cos_at, sin_at, cos_stride, sin_stride, positions, half = tables
    kind, table_kind = kinds
    batches, heads, new, dim, v_dim = sizes
    into_k, into_v, of_k, of_v = strides
    rows = batches * heads * new
    for row in range(part * rows // parts, (part + 1) * rows // parts):
        batch, head, token = row // (heads * new), row // new % heads, row % new
        position = np.int64(load(pointer(before_at, NUMBER), batch)) + token
        page, slot = place_in(cache, batch, position)
        if page < 0:
            continue
        x = batch * of_k[0] + head * of_k[1] + token * of_k[2]
        y = page * into_k[0] + head * into_k[1] + slot * into_k[2]
        k, to = offset(pointer(k_at, kind), x), offset(pointer(k_cache_at, kind), y)
        if position < positions:
            cos = offset(pointer(cos_at, table_kind), position * cos_stride)
            sin = offset(pointer(sin_at, table_kind), position * sin_stride)
            _turn_row(to, k, kind, cos, sin, half, interleaved)
        else:
            for j in range(2 * half):
                store(to, j, real(kind, math.nan))
        _copy(offset(to, 2 * half), offset(k, 2 * half), dim - 2 * half)
        x = batch * of_v[0] + head * of_v[1] + token * of_v[2]
        y = page * into_v[0] + head * into_v[1] + slot * into_v[2]
        _copy(offset(pointer(v_cache_at, kind), y), offset(pointer(v_at, kind), x), v_dim)
