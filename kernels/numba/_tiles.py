"""Tiles of a tensor in scratch, padded with zeros, and what may not be seen of a tile of scores."""

import math

import numpy as np
from torch import Tensor

from tilewise.kernels.numba._matmul import HEIGHT, LANES, lanes, once
from tilewise.kernels.numba._online_softmax import hide_later
from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._shared import broadcast_strides
from tilewise.kernels.numba._simd import address, load, offset, pointer, real, store

ROUND = max(LANES, int(HEIGHT))  # to which sizes are padded in scratch
FLAG = np.uint8(0)
NONE = np.int64(0)  # the address of no mask


def rounded(size: int) -> int:
    return (size + ROUND - 1) // ROUND * ROUND


padded = callee(rounded)


@callee
def start_of(strides, batch, head):
    return batch * strides[0] + head * strides[1]


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
def _hide_masked(scores, stride, keys, mask_at, mask_key):
    mask = pointer(mask_at, FLAG)
    for i in range(keys):
        if load(mask, i * mask_key) == 0:
            store(scores, i * stride, real(scores, -math.inf))


@callee
def hide(
    scores, stride, limits, cols, rows, first_row, first_key, keys, seq_q, seq_k,
    causal, mask_at, mask_strides,
):  # fmt: skip
    """Set -inf where causality or the mask hides a key from the query of a lane.

    Lanes are rows `first_row`, ... of the heads that share a key, each of `seq_q` queries.
    """
    once()
    width = lanes(scores)
    _, mask_head, mask_query, mask_key = mask_strides
    lowest = first_row % seq_q
    if lowest + rows > seq_q:
        lowest = 0
    query, head = first_row % seq_q, first_row // seq_q
    if causal and first_key + keys > lowest + seq_k - seq_q + 1:
        for j in range(cols):
            visible = query + seq_k - seq_q + 1 - first_key
            store(limits, j, real(limits, min(max(visible, 0), keys)))
            query = query + 1 if query + 1 < seq_q else 0
        for vector in range(cols // width):
            j = vector * width
            hide_later(offset(scores, j), stride, keys, offset(limits, j))
    if mask_at:
        query = first_row % seq_q
        for j in range(rows):
            start = head * mask_head + query * mask_query + first_key * mask_key
            _hide_masked(offset(scores, j), stride, keys, mask_at + start, mask_key)
            query += 1
            if query == seq_q:
                query, head = 0, head + 1


def mask_options(mask: Tensor | None) -> tuple[int, tuple[int, ...], int]:
    """Its address, its strides with 0 along broadcast dims, and whether it only hides padding."""
    padding = mask is not None and mask.shape[2] == 1
    return address(mask), broadcast_strides(mask), int(padding)
