"""Dropout on the CPU: what is kept of a row, marked before the row is gone through."""

from torch import Tensor

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._philox import keep, philox
from tilewise.kernels.numba._simd import INTEGER, address, load, pointer, real, store

WORDS = 1 << 32
ANY, SCALE = 0, 2  # where these stand in what `draw` returns


@callee
def _of_row(numbers_at, step, number, row):
    """The row's own number, where there is a tensor, else the number for all."""
    return load(pointer(numbers_at, INTEGER), row * step) if numbers_at else number


@callee
def mark_kept(p, first, count, row, dropout, value):
    """`value` where dropout keeps, 0 where it drops, at p[0] to p[count - 1].

    These are columns of a row from `first` on, a multiple of 4: a counter serves four of them.
    Where the row has no scratch, 1 marks them in the result itself, whatever that is rounded to.
    """
    _, threshold, _, seeds_at, seed_step, seed, offsets_at, offset_step, place = dropout
    seed = _of_row(seeds_at, seed_step, seed, row)
    place = _of_row(offsets_at, offset_step, place, row)
    row = 0 if seed_step else row  # with one seed a row, a draw does not know the row
    kept, none = real(p, value), real(p, 0)
    group, groups = first // 4, count // 4
    for i in range(groups):
        a, b, c, d = philox(seed, place, row, group + i)
        store(p, 4 * i, kept if keep(a, threshold) else none)
        store(p, 4 * i + 1, kept if keep(b, threshold) else none)
        store(p, 4 * i + 2, kept if keep(c, threshold) else none)
        store(p, 4 * i + 3, kept if keep(d, threshold) else none)
    if count % 4:
        words = philox(seed, place, row, group + groups)
        for j in range(count % 4):
            store(p, 4 * groups + j, kept if keep(words[j], threshold) else none)


def draw(
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int
) -> tuple[int | float, ...]:
    """What a kernel takes: whether there is any dropout, the threshold, the scale of what is kept,
    then of seeds and of offsets the address, how far apart they are, and the number for all."""
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    apart = [(address(t), 0 if t is None else t.ndim) for t in (seeds, offsets)]
    return (int(dropout_p > 0), int(dropout_p * WORDS), scale, *apart[0], seed, *apart[1], offset)
