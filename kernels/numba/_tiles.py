"""Tiles of a tensor in scratch, padded with zeros."""

import numpy as np

from tilewise.kernels.numba._matmul import HEIGHT, LANES, once
from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import load, offset, pointer, real, store

ROUND = max(LANES, int(HEIGHT))  # to which sizes are padded in scratch
FLAG = np.uint8(0)
END = np.int32(0)
NONE = np.int64(0)  # the address of no mask


def rounded(size: int) -> int:
    return (size + ROUND - 1) // ROUND * ROUND


padded = callee(rounded)


@callee
def read_rows(to, width, source, stride, rows, tall, cols, factor, seen_at, seen_step):
    """to[tall, width] = factor * source[rows, cols], zeros elsewhere and where `seen` is False."""
    once()
    for i in range(tall):
        x, y = offset(source, i * stride), offset(to, i * width)
        filled = cols if i < rows else 0
        if i < rows and seen_at and load(pointer(seen_at, FLAG), i * seen_step) == 0:
            filled = 0
        for j in range(filled):
            store(y, j, load(x, j) * factor)
        for j in range(width - filled):
            store(y, filled + j, real(to, 0))


@callee
def read_tile(to, width, source, stride, keys, cols, factor, seen_at, seen_step):
    tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
    read_rows(to, width, source, stride, keys, tall, cols, factor, seen_at, seen_step)


@callee
def write_tile(to, source, width, first, keys, cols, stride, factor):
    """Rows `first` and on of `to` = factor * source."""
    once()
    for i in range(keys):
        x, y = offset(source, i * width), offset(to, (first + i) * stride)
        for j in range(cols):
            store(y, j, load(x, j) * factor)


@callee
def fill(to, size):
    for i in range(size):
        store(to, i, real(to, 0))


@callee
def span_of(ends, batch, longest):
    """Where a packed sequence begins, and its rows; all `longest` from 0 on without `ends`.

    `ends` is an address and how many rows there are: no wrong number leads beyond them.
    """
    ends_at, total = ends
    if ends_at == 0:
        return np.int64(0), np.int64(longest)
    numbers = pointer(ends_at, END)
    first, end = np.int64(load(numbers, batch)), np.int64(load(numbers, batch + 1))
    if first < 0:
        return np.int64(0), np.int64(0)
    return first, min(max(min(end, total) - first, np.int64(0)), np.int64(longest))
