"""The options of rows of logits, as the launchers of sampling take them."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, stream

COUNT = 17  # of the arguments of `tilewise.sampling.OPTIONS`
OFF = (*[None] * 10, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
GROUP = 4  # tokens that are read at once


def packed(logits: Tensor, options: tuple) -> tuple[tuple, tuple]:
    """Rows of logits, and of `OPTIONS` what each row has, history, bias and mask, then what counts
    for all. Rows that are too long to be held come adjusted, and have none of these three."""
    each, sources, numbers = options[:7], options[7:10], options[10:COUNT]
    rows, vocab = logits.shape
    if any(x is not None for x in sources) and not _cuda.sample_is_held(rows, vocab):
        adjusted = room_for_rows(logits)
        _cuda.sample_adjust(
            address(adjusted), *packed_rows(logits), *map(address, each[4:]), *_sources(*sources),
            *numbers[4:], DTYPES[logits.dtype], stream(logits),
        )  # fmt: skip
        logits, sources = adjusted, (None, None, None)
    return (logits, *packed_rows(logits)), (*map(address, each), *_sources(*sources), *numbers)


def packed_rows(logits: Tensor) -> tuple[int, ...]:
    """Where rows are, how many and how long, and how far apart."""
    return address(logits), *logits.shape, logits.stride(0)


def _sources(history: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    return (
        address(history), 0 if history is None else history.shape[1],
        address(bias), 0 if bias is None else bias.stride(0),
        address(mask), 0 if mask is None else mask.stride(0),
    )  # fmt: skip


def packed_draws(
    seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int
) -> tuple[int, ...]:
    """Addresses of seeds and offsets, how far those of rows are apart, and those for all."""
    strides = (0 if t is None else t.ndim for t in (seeds, offsets))
    return address(seeds), address(offsets), *strides, seed, offset


def room_for_rows(logits: Tensor) -> Tensor:
    """Rows in fp32 for those that are too long to be held, each from a whole group on."""
    rows, vocab = logits.shape
    return logits.new_empty(rows, -(-vocab // GROUP) * GROUP, dtype=torch.float32)[:, :vocab]


def room_for_ranked(x: Tensor, count: int) -> Tensor:
    """Memory in which so many of each row are sorted: a power of two, for a bitonic sort."""
    size = 1 << (min(count, x.shape[1]) - 1).bit_length() if count else 0
    return x.new_empty(len(x), size, dtype=torch.int64)
