"""The options of a row of logits; and the row with penalties, bias and mask, in fp32 or fp64."""

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._ranks import BLOCK, INFINITY
from tilewise.kernels.numba._shared import laid_out, wide_dtype
from tilewise.kernels.numba._simd import KINDS, address, load, offset, pointer, real, store

INT32, UINT32, INT64 = np.int32(0), np.uint32(0), np.int64(0)  # kinds
NUMBERS = 6  # temperature, top_p, min_p and the penalties for repetition, presence, frequency
COUNT = 2 * NUMBERS + 5  # of the arguments of a launcher that `packed` takes


def packed(arguments: tuple) -> tuple[tuple, int, tuple, tuple]:
    """Addresses of each row's own top-k and numbers; for all rows top-k, and numbers; and of
    history, bias and mask the address and how far rows are apart."""
    each, (history, bias, mask) = arguments[: NUMBERS + 1], arguments[NUMBERS + 1 : NUMBERS + 4]
    top_k, *numbers = arguments[NUMBERS + 4 : COUNT]
    length = 0 if history is None else history.shape[1]
    sources = (address(history), length, *_lying(bias), *_lying(mask))
    return tuple(map(address, each)), int(top_k), tuple(map(float, numbers)), sources


def _lying(x: Tensor | None) -> tuple[int, int]:
    return address(x), 0 if x is None else x.stride(0)


def is_adjusted(arguments: tuple) -> bool:
    """Whether a row is another one than was given."""
    return any(x is not None for x in arguments[NUMBERS + 1 : NUMBERS + 4])


def packed_draws(seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int) -> tuple:
    """Addresses of each row's own seed and offset, how far they are apart, and those for all."""
    strides = (0 if x is None else x.ndim for x in (seeds, offsets))
    return address(seeds), address(offsets), *strides, seed, offset


class Scratch:
    """Memory of a task: block maxima, masses, values, columns, the adjusted row and its counts; and
    what else is asked for, as counts of elements and their bytes."""

    def __init__(self, logits: Tensor, arguments: tuple, *more: tuple[int, int]):
        vocab, wide = logits.shape[1], wide_dtype(logits.dtype).itemsize
        row = is_adjusted(arguments) * (vocab + BLOCK)
        counts = 0 if arguments[NUMBERS + 1] is None else vocab
        self.places, self.size = laid_out(
            (-(-vocab // BLOCK), wide), *3 * [(vocab + BLOCK, wide)], (row, wide), (counts, 4),
            *more,
        )  # fmt: skip
        self.tasks = min(len(logits), torch.get_num_threads())
        self.memory = logits.new_empty(self.tasks * self.size, dtype=torch.uint8)


def row_kinds(logits: Tensor, arguments: tuple) -> tuple:
    """Kinds of the logits, of what is drawn from, and of what is computed in."""
    kind, wide = KINDS[logits.dtype], KINDS[wide_dtype(logits.dtype)]
    return kind, wide if is_adjusted(arguments) else kind, wide


@callee
def _number(at, i, number, wide):
    return load(pointer(at, wide), i) if at else real(wide, number)


@callee
def options_of(i, places, k, numbers, wide):
    """Of row i: whether they are in their ranges; temperature, top-k, top-p, min-p; penalties for
    repetition, presence, frequency."""
    k = load(pointer(places[0], INT64), i) if places[0] else k
    t = _number(places[1], i, numbers[0], wide)
    p = _number(places[2], i, numbers[1], wide)
    m = _number(places[3], i, numbers[2], wide)
    repetition = _number(places[4], i, numbers[3], wide)
    presence = _number(places[5], i, numbers[4], wide)
    frequency = _number(places[6], i, numbers[5], wide)
    can = t >= 0 and t < INFINITY and k >= 0 and p >= 0 and p <= 1 and m >= 0 and m <= 1
    can = can and repetition > 0 and repetition < INFINITY
    can = can and abs(presence) < INFINITY and abs(frequency) < INFINITY
    return can, (t, k, p, m), (repetition, presence, frequency)


@callee
def draws_of(i, draws):
    """Seed and offset of row i, and the row of its counters; of addresses of seeds and offsets, how
    far those of rows are apart, and what counts where there are none."""
    seeds_at, offsets_at, seed_stride, offset_stride, seed, place = draws
    seed = load(pointer(seeds_at, INT64), i * seed_stride) if seeds_at else seed
    place = load(pointer(offsets_at, INT64), i * offset_stride) if offsets_at else place
    return seed, place, 0 if seed_stride else i


@callee
def clear_counts(counts, sources, vocab):
    """What `adjusted_row` finds, and leaves, at 0."""
    if sources[0]:
        for j in range(vocab):
            store(counts, j, np.int32(0))


@callee
def _penalise(y, counts, history, length, vocab, penalties):
    repetition, presence, frequency = penalties
    for n in range(length):
        token = load(history, n)
        if token >= 0 and token < vocab:
            store(counts, token, np.int32(load(counts, token) + 1))
    for n in range(length):
        token = load(history, n)
        if token >= 0 and token < vocab and load(counts, token) > 0:
            v = load(y, token)
            v = v / repetition if v > 0 else v * repetition
            v = v - frequency * real(y, load(counts, token))
            store(y, token, v - presence)
            store(counts, token, np.int32(0))


@callee
def _forbid(y, words, vocab):
    for w in range((vocab + 31) // 32):
        word, part = load(words, w), offset(y, w * 32)
        for j in range(min(32, vocab - w * 32)):
            if (word >> np.uint32(j)) & np.uint32(1) == 0:
                store(part, j, real(y, -INFINITY))


@callee
def _adjust(y, counts, x, vocab, i, sources, penalties, wide):
    """Write row i as it is to be drawn from."""
    history_at, length, bias_at, bias_stride, mask_at, mask_stride = sources
    for j in range(vocab):
        store(y, j, load(x, j))
    if history_at:
        history = offset(pointer(history_at, INT64), i * length)
        _penalise(y, counts, history, length, vocab, penalties)
    if bias_at:
        bias = offset(pointer(bias_at, wide), i * bias_stride)
        for j in range(vocab):
            store(y, j, load(y, j) + load(bias, j))
    if mask_at:
        _forbid(y, offset(pointer(mask_at, UINT32), i * mask_stride), vocab)


@callee
def row_of(x_at, i, x_stride, y_at, counts, vocab, sources, penalties, kinds):
    """Row i as it is to be drawn from: where it lies, or adjusted at `y_at`."""
    given, drawn, wide = kinds
    if sources[0] or sources[2] or sources[4]:
        x = offset(pointer(x_at, given), i * x_stride)
        _adjust(pointer(y_at, wide), counts, x, vocab, i, sources, penalties, wide)
        return pointer(y_at, drawn)
    return offset(pointer(x_at, drawn), i * x_stride)
