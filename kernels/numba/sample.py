"""Sampling on the CPU: rows in parallel, or parts of few; no sort, noise only for tokens that can
still win.

A row with penalties, a bias or a mask is written once to the scratch of its task, in fp32 or fp64,
and from there on is a row like any other.
"""

import torch
from torch import Tensor

from tilewise.kernels.numba._filter import filter_logits_forward
from tilewise.kernels.numba._gumbel import draw_row
from tilewise.kernels.numba._linear_sample import linear_sample_forward
from tilewise.kernels.numba._logprobs import sample_with_logprobs_forward
from tilewise.kernels.numba._multinomial import multinomial_forward
from tilewise.kernels.numba._options import (
    COUNT,
    INT32,
    INT64,
    Scratch,
    clear_counts,
    packed,
    packed_draws,
    row_kinds,
)
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._row_parts import (
    FOUND,
    draw_parts,
    find_tops,
    finish_rows,
    is_split,
    parts_of,
    weigh_parts,
)
from tilewise.kernels.numba._simd import address, pointer, store
from tilewise.kernels.numba._top_k import top_k_forward
from tilewise.kernels.numba._verify_draft import verify_draft_forward

__all__ = [
    "filter_logits_forward",
    "linear_sample_forward",
    "multinomial_forward",
    "sample_forward",
    "sample_with_logprobs_forward",
    "top_k_forward",
    "verify_draft_forward",
]


@Kernel
def _sample(
    task, tokens_at, x_at, places, k, numbers, sources, draws, scratch_at, parts, kinds,
    rows, vocab, x_stride, scratch_stride, tasks,
):  # fmt: skip
    tokens = pointer(tokens_at, INT64)
    scratch = scratch_at + task * scratch_stride
    clear_counts(pointer(scratch + parts[5], INT32), sources, vocab)
    for i in range(task, rows, tasks):
        token, _, _, _ = draw_row(
            i, x_at, places, k, numbers, sources, draws, scratch, parts, kinds, vocab, x_stride
        )
        store(tokens, i, token)


def sample_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab]; options as `_options.packed`, seeds and offsets [batch] or [], or
    numbers -> [batch]."""
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if is_split(logits, arguments):
        _draw_split(tokens, logits, arguments)
        return tokens
    scratch = Scratch(logits, arguments)
    _sample(
        scratch.tasks, logits.numel(), address(tokens), address(logits), *packed(arguments),
        packed_draws(*arguments[COUNT:]), address(scratch.memory), scratch.places,
        row_kinds(logits, arguments), rows, vocab, logits.stride(0), scratch.size, scratch.tasks,
    )  # fmt: skip
    return tokens


def _draw_split(tokens: Tensor, logits: Tensor, arguments: tuple) -> None:
    """The same of a few rows in parts."""
    (rows, vocab), count = logits.shape, parts_of(logits.shape[1])
    scratch = Scratch(logits, arguments, (count * FOUND, 8), (count, 8))
    places, top_k, numbers, _ = packed(arguments)
    options, draws = (places, top_k, numbers), packed_draws(*arguments[COUNT:])
    x, size = address(logits), logits.numel()
    place = (address(scratch.memory), scratch.places, row_kinds(logits, arguments))
    sizes = (vocab, logits.stride(0), scratch.size, count)
    find_tops(rows * count, size, x, *place, *sizes)
    draw_parts(rows * count, size, x, *options, draws, *place, *sizes)
    if places[2] or numbers[1] < 1:
        weigh_parts(rows * count, size, x, *options, *place, *sizes)
    finish_rows(rows, size, address(tokens), x, *options, draws, *place, *sizes)
