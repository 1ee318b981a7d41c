"""What turning heads on the CPU shares: how q and k are walked, and where a row stands."""

from itertools import chain

import numba
import numpy as np
from torch import Tensor

from tilewise.kernels.numba._simd import address, load, pointer

INT32, INT64 = np.int32(0), np.int64(0)  # kinds

inline = numba.njit(inline="always")


def layout(*tensors: Tensor) -> tuple[int, ...]:
    """Addresses of [batch, heads, seq, dim], and how to walk them as the last lies in memory.

    The batch is the outermost loop. Of heads and seq the one with the larger stride comes next.

    Returns:
        The addresses; rows, outer and inner ones; whether seq is the inner; three strides of each.
    """
    batch, heads, seq, _ = tensors[-1].shape
    walks = [t.stride() for t in tensors]
    if walks[-1][2] <= walks[-1][1]:
        counts = heads, seq, 1
        walks = [stride[:3] for stride in walks]
    else:
        counts = seq, heads, 0
        walks = [(stride[0], stride[2], stride[1]) for stride in walks]
    return *map(address, tensors), batch * heads * seq, *counts, *chain(*walks)


def places(position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int) -> tuple[int, ...]:
    """What `position_of` is given, after batch and row."""
    strides = (0, 0) if position_ids is None else position_ids.stride()
    sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return address(position_ids), *strides, address(cu_seqlens), sequences, offset


PAST = -(1 << 62)  # the position of a row that belongs to no sequence


@inline
def position_of(batch, row, place):
    """The position of a row of the batch; PAST behind the last of packed sequences."""
    ids_at, ids_batch, ids_seq, ends_at, sequences, offset = place
    position = row
    if ids_at:
        position = load(pointer(ids_at, INT64), batch * ids_batch + row * ids_seq)
    if ends_at:
        ends = pointer(ends_at, INT32)
        low, high = 0, sequences + 1  # of those that begin at the row or before, the last
        while high - low > 1:
            middle = (low + high) // 2
            if load(ends, middle) <= row:
                low = middle
            else:
                high = middle
        position = PAST if low == sequences else row - load(ends, low)
    return position if position == PAST else position + offset
