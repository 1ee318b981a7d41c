"""Dropout on the GPU: what is kept of a row is drawn anew wherever it is needed."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._philox import keep, philox_words

WORDS = 1 << 32


@triton.jit
def _number_of(ptr, number, row, there, STRIDE: tl.constexpr):
    """The row's own int64, where there is a tensor, else the number for all."""
    if ptr is None:
        return tl.cast(number, tl.int64)
    else:
        return tl.load(ptr + row * STRIDE, mask=there, other=0)


@triton.jit
def dropped(
    x, row, start, seeds_ptr, offsets_ptr, seed, offset, threshold, scale,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr, there=True,
):  # fmt: skip
    """`x`, columns `start` to `start` + BLOCK - 1, where dropout keeps it, scaled; 0 elsewhere.

    Of one row, or of a tile's [rows, 1], those that are `there`; 4 divides both numbers.
    """
    seed = _number_of(seeds_ptr, seed, row, there, SEED_STRIDE)
    offset = _number_of(offsets_ptr, offset, row, there, OFFSET_STRIDE)
    place = row * (1 - SEED_STRIDE)  # with one seed a row, a draw does not know the row
    words = philox_words(seed, offset, place, start, BLOCK)
    return tl.where(keep(words, threshold), x * scale, 0.0)


def draw(
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int
) -> tuple[tuple[Tensor | None, Tensor | None, int, int, int, float], dict[str, int]]:
    """What a kernel is given to drop out: seeds, offsets, seed, offset, threshold and the scale of
    what is kept; and its options."""
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    strides = (0 if t is None else t.ndim for t in (seeds, offsets))
    options = dict(zip(("SEED_STRIDE", "OFFSET_STRIDE"), strides, strict=True))
    numbers = (seeds, offsets, seed, offset, int(dropout_p * WORDS), scale)
    return numbers, {"DROPOUT": dropout_p > 0, **options}


NO_DROPOUT = draw(0.0, None, None, 0, 0)
