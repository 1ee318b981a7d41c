"""The options of rows of logits, as the launchers of sampling take them."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import address

COUNT = 17  # of the arguments of `tilewise.sampling.OPTIONS`
GROUP = 4  # tokens that are read at once


def packed(options: tuple) -> tuple[int | float, ...]:
    """Of `OPTIONS`: what each row has, history, bias and mask, then what counts for all."""
    each, (history, bias, mask), numbers = options[:7], options[7:10], options[10:COUNT]
    return (
        *map(address, each),
        address(history), 0 if history is None else history.shape[1],
        address(bias), 0 if bias is None else bias.stride(0),
        address(mask), 0 if mask is None else mask.stride(0),
        *numbers,
    )  # fmt: skip


def packed_draws(
    seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int
) -> tuple[int, ...]:
    """Addresses of seeds and offsets, how far those of rows are apart, and those for all."""
    strides = (0 if t is None else t.ndim for t in (seeds, offsets))
    return address(seeds), address(offsets), *strides, seed, offset


def room_for_adjusted(logits: Tensor, options: tuple) -> Tensor | None:
    """Memory for rows that have penalties, a bias or a mask, and are too long to be held."""
    rows, vocab = logits.shape
    if all(x is None for x in options[7:10]) or _cuda.sample_is_held(rows, vocab):
        return None
    return logits.new_empty(rows, -(-vocab // GROUP) * GROUP, dtype=torch.float32)
