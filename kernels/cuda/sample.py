"""Sampling in CUDA C++: a cluster of blocks holds a row, which is read once; no sort."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._options import COUNT, packed, packed_draws, room_for_adjusted
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def sample_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab]; options as `_options.packed`, seeds and offsets [batch] or [], or
    numbers -> [batch]."""
    rows, vocab = logits.shape
    options, draws = arguments[:COUNT], arguments[COUNT:]
    tokens = logits.new_empty(rows, dtype=torch.int64)
    adjusted = room_for_adjusted(logits, options)
    _cuda.sample_forward(
        address(tokens), address(adjusted), address(logits), rows, vocab, logits.stride(0),
        *packed(options), *packed_draws(*draws), DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return tokens
