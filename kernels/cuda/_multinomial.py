"""Several draws from each row in CUDA C++: the row is held, and drawn from again and again, or
ranked once."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._options import (
    packed_draws,
    packed_rows,
    room_for_ranked,
    room_for_rows,
)
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def multinomial_forward(
    x: Tensor, num_samples: int, replacement: bool, weights: bool, *draws
) -> Tensor:
    """x [rows, vocab], weights or logarithms; seeds and offsets -> [rows, num_samples]."""
    places = x.new_empty(len(x), num_samples, dtype=torch.int64)
    together = num_samples > 1 and not replacement
    noise = packed_draws(*draws)
    if weights and not _cuda.sample_is_held(*x.shape):
        scores = room_for_rows(x)
        _cuda.sample_scores(
            address(scores), *packed_rows(x), together, *noise, DTYPES[x.dtype], stream(x)
        )
        x, weights = scores, False
    rows, last = packed_rows(x), (*noise, DTYPES[x.dtype], stream(x))
    if together:
        room = room_for_ranked(x, num_samples)
        _cuda.sample_distinct(
            address(places), address(room), *rows, num_samples, room.stride(0), weights, *last
        )
    else:
        _cuda.sample_several(address(places), *rows, num_samples, weights, *last)
    return places
