"""Sampling in CUDA C++: a cluster of blocks holds a row, which a draw reads once and never sorts;
the few that are asked for in rank are."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._linear_sample import linear_sample_forward
from tilewise.kernels.cuda._multinomial import multinomial_forward
from tilewise.kernels.cuda._options import COUNT, OFF, packed, packed_draws, room_for_ranked
from tilewise.kernels.cuda._shared import DTYPES, address, stream
from tilewise.kernels.cuda._verify_draft import verify_draft_forward

__all__ = [
    "filter_logits_forward",
    "linear_sample_forward",
    "multinomial_forward",
    "sample_forward",
    "sample_with_logprobs_forward",
    "top_k_forward",
    "verify_draft_forward",
]


def sample_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab]; options as `_options.packed`, seeds and offsets [batch] or [], or
    numbers -> [batch]."""
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    (logits, *rows), options = packed(logits, arguments[:COUNT])
    _cuda.sample_forward(
        address(tokens), *rows, *options, *packed_draws(*arguments[COUNT:]),
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return tokens


def sample_with_logprobs_forward(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """logits [batch, vocab]; options as `_options.packed`, how many of the likeliest, whether after
    all filters, seeds and offsets -> tokens, logprobs [batch]; logprobs, tokens [batch, count]."""
    options, (count, processed, *draws) = arguments[:COUNT], arguments[COUNT:]
    tokens = sample_forward(logits, *options, *draws)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    top_logprobs = logits.new_empty(len(logits), count, dtype=torch.float32)
    top_tokens = logits.new_empty(len(logits), count, dtype=torch.int64)
    room = room_for_ranked(logits, count)
    (logits, *rows), options = packed(logits, options if processed else OFF)
    _cuda.sample_logprobs(
        *map(address, (logprobs, top_logprobs, top_tokens, room, tokens)), *rows,
        count, room.stride(0), processed, *options, DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return tokens, logprobs, top_logprobs, top_tokens


def top_k_forward(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [rows, vocab] -> values, indices [rows, k]."""
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    if k:
        room = room_for_ranked(x, k)
        _cuda.sample_top_k(
            *map(address, (values, indices, room, x)), *x.shape, x.stride(0), k, room.stride(0),
            DTYPES[x.dtype], stream(x),
        )  # fmt: skip
    return values, indices


def filter_logits_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab], options as `_options.packed`, whether probabilities are wanted
    -> [batch, vocab], of the dtype of the logits; probabilities in fp32."""
    as_probabilities, dtype = arguments[COUNT], logits.dtype
    (logits, *rows), options = packed(logits, arguments[:COUNT])
    out = logits.new_empty(logits.shape, dtype=torch.float32 if as_probabilities else None)
    kept, probabilities = (None, out) if as_probabilities else (out, None)
    _cuda.sample_filter(
        address(kept), address(probabilities), *rows, *options,
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return out if as_probabilities else out.to(dtype)
