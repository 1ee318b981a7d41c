"""Dropout on the CPU: what is kept of a row, written where the result will be."""

import numba
import torch
from torch import Tensor

from tilewise.kernels.numba._philox import keep, philox
from tilewise.kernels.numba._simd import KINDS, address, load, offset, pointer, real, store

WORDS = 1 << 32


@numba.njit(inline="always")
def mark_kept(p, first, count, seed, place, row, threshold):
    """1 where dropout keeps, 0 where it drops, at p[0] to p[count - 1].

    These are columns from `first` on, a multiple of 4: a counter serves four of them, and what
    marks them in the result itself needs no scratch.
    """
    group, groups = first // 4, count // 4
    for i in range(groups):
        a, b, c, d = philox(seed, place, row, group + i)
        store(p, 4 * i, real(p, keep(a, threshold)))
        store(p, 4 * i + 1, real(p, keep(b, threshold)))
        store(p, 4 * i + 2, real(p, keep(c, threshold)))
        store(p, 4 * i + 3, real(p, keep(d, threshold)))
    if 4 * groups < count:
        a, b, c, d = philox(seed, place, row, group + groups)
        store(p, 4 * groups, real(p, keep(a, threshold)))
        if 4 * groups + 1 < count:
            store(p, 4 * groups + 1, real(p, keep(b, threshold)))
        if 4 * groups + 2 < count:
            store(p, 4 * groups + 2, real(p, keep(c, threshold)))


@numba.njit(inline="always")
def of_row(numbers_at, stride, number, row, kind):
    """The row's own number, where there is a tensor, else the number for all."""
    return load(offset(pointer(numbers_at, kind), row * stride), 0) if numbers_at else number


def draw(dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int):
    """What a kernel takes: the threshold, the scale of what is kept, then of seeds and of offsets
    the address, how far apart they are, and the number for all; last the kind of both."""
    apart = [(address(t), 0 if t is None else t.ndim) for t in (seeds, offsets)]
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    return (
        int(dropout_p * WORDS), scale, *apart[0], seed, *apart[1], offset, KINDS[torch.int64],
    )  # fmt: skip
