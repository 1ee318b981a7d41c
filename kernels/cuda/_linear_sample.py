"""Draws from linear logits in CUDA C++: of a tile of them its best are kept."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._options import packed_draws
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def linear_sample_forward(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, temperatures: Tensor | None,
    seeds: Tensor | None, offsets: Tensor | None, temperature: float, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """hidden [rows, dim], weight [vocab, dim], bias [vocab]; temperatures, seeds, offsets [rows],
    or numbers -> [rows]."""
    (rows, dim), vocab = hidden.shape, len(weight)
    tiles = -(-vocab // _cuda.tile_tokens)
    tokens = hidden.new_empty(rows, dtype=torch.int64)
    floats = hidden.new_empty(2, rows, tiles, dtype=torch.float32)
    columns = hidden.new_empty(2, rows, tiles, dtype=torch.int32)
    _cuda.sample_linear(
        *map(address, (tokens, floats, columns, hidden, weight, linear_bias)), rows, vocab, dim,
        hidden.stride(0), weight.stride(0), address(temperatures), float(temperature),
        *packed_draws(seeds, offsets, seed, offset), DTYPES[hidden.dtype], stream(hidden),
    )  # fmt: skip
    return tokens
