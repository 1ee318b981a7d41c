"""Sampling on the CPU: rows in parallel, no sort, noise only for tokens that can still win.

A row with penalties, a bias or a mask is written once to the scratch of its task, in fp32 or fp64,
and from there on is a row like any other.
"""

import torch
from torch import Tensor

from tilewise.kernels.numba._gumbel import draw_token
from tilewise.kernels.numba._options import (
    COUNT,
    INT32,
    INT64,
    UINT32,
    Scratch,
    adjust,
    clear_counts,
    options_of,
    packed,
)
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._ranks import INFINITY, block_maxima
from tilewise.kernels.numba._simd import address, load, offset, pointer, store


@Kernel
def _sample(
    task, tokens_at, x_at, places, k, numbers, sources, seeds_at, offsets_at, scratch_at, parts,
    kinds, rows, vocab, x_stride, scratch_stride, seed_stride, offset_stride, tasks, seed, place,
):  # fmt: skip
    given, drawn, wide = kinds
    tokens, seeds = pointer(tokens_at, INT64), pointer(seeds_at, INT64)
    offsets = pointer(offsets_at, INT64)
    scratch = scratch_at + task * scratch_stride
    maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    words, counts = pointer(scratch + parts[3], UINT32), pointer(scratch + parts[5], INT32)
    clear_counts(counts, sources, vocab)
    for i in range(task, rows, tasks):
        can, filters, penalties = options_of(i, places, k, numbers, wide)
        x = offset(pointer(x_at, drawn), i * x_stride)
        if sources[0] or sources[2] or sources[4]:
            x = pointer(scratch + parts[4], drawn)
            row = pointer(scratch + parts[4], wide)
            adjust(
                row, counts, offset(pointer(x_at, given), i * x_stride), vocab, i, sources,
                penalties, wide,
            )  # fmt: skip
        top = block_maxima(maxima, x, vocab)
        token = -1
        if can and top > -INFINITY:
            t, top_k, p, m = filters
            token = draw_token(
                maxima, masses, values, columns, words, x, vocab, top, t, top_k, p, m,
                load(seeds, i * seed_stride) if seeds_at else seed,
                load(offsets, i * offset_stride) if offsets_at else place,
                0 if seed_stride else i,
            )  # fmt: skip
        store(tokens, i, token)


def sample_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab]; options as `_options.packed`, seeds and offsets [batch] or [], or
    numbers -> [batch]."""
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    seeds, offsets, seed, place = arguments[COUNT:]
    scratch = Scratch(logits, arguments)
    _sample(
        scratch.tasks, logits.numel(), address(tokens), address(logits), *packed(arguments),
        address(seeds), address(offsets), address(scratch.memory), scratch.places,
        scratch.kinds(logits, arguments), rows, vocab, logits.stride(0), scratch.size,
        _stride(seeds), _stride(offsets), scratch.tasks, seed, place,
    )  # fmt: skip
    return tokens


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.ndim
