"""What is left of rows of logits after all filters, as logits or as probabilities."""

import math

import numpy as np
from torch import Tensor

from tilewise.kernels.numba._options import (
    COUNT,
    INT32,
    Scratch,
    clear_counts,
    options_of,
    packed,
    row_kinds,
    row_of,
)
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._ranks import (
    BLOCK,
    INFINITY,
    LARGE,
    block_maxima,
    inverse_of,
    is_left,
    prefix,
)
from tilewise.kernels.numba._shared import wide_dtype
from tilewise.kernels.numba._simd import (
    address,
    exp,
    fma,
    kind,
    load,
    maximum,
    offset,
    pointer,
    real,
    store,
)

NAN = math.nan
SMALL = 1e-6


@callee
def fill(out, vocab, value):
    """Write the same number everywhere."""
    for j in range(vocab):
        store(out, j, real(out, value))


@callee
def _write_logits(out, x, vocab, top, t, least, stop):
    # In fp64: so a temperature near 0 has an inverse, and logits are rounded once.
    inverse = 1.0 / t if t > 0 else 1.0
    for j in range(vocab):
        v = load(x, j)
        # Beside an infinite logit nothing else is left.
        left = is_left(v, j, least, stop) & ((top < INFINITY) | (v == top))
        scaled = real(x, np.float64(v) * inverse)
        store(out, j, scaled if left else real(x, -INFINITY))


@callee
def _write_probabilities(out, x, vocab, top, t, least, stop):
    # An inverse in two parts: its rounding would be that of all masses alike.
    inverse = inverse_of(real(x, t)) if t > 0 else real(x, 1)
    rest = real(x, 1.0 / t - np.float64(inverse)) if t > SMALL else real(x, 0)
    total = 0.0
    for b in range((vocab + BLOCK - 1) // BLOCK):
        start = b * BLOCK
        block, masses, part = offset(x, start), offset(out, start), real(x, 0)
        for j in range(min(BLOCK, vocab - start)):
            v = load(block, j)
            gap = maximum(real(x, 0) if v == top else v - top, real(x, -LARGE))
            mass = exp(fma(gap, inverse, gap * rest))
            mass = mass if is_left(v, start + j, least, stop) else real(x, 0)
            store(masses, j, mass)
            part += mass
        total += part
    whole = real(x, total)
    for j in range(vocab):
        store(out, j, load(out, j) / whole)


@Kernel
def _filter(
    task, out_at, x_at, places, k, numbers, sources, scratch_at, parts, kinds, out_kind,
    rows, vocab, x_stride, scratch_stride, tasks, as_probabilities,
):  # fmt: skip
    wide = kinds[2]
    scratch = scratch_at + task * scratch_stride
    maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    counts = pointer(scratch + parts[5], INT32)
    clear_counts(counts, sources, vocab)
    for i in range(task, rows, tasks):
        out = offset(pointer(out_at, out_kind), i * vocab)
        can, filters, penalties = options_of(i, places, k, numbers, wide)
        x = row_of(x_at, i, x_stride, scratch + parts[4], counts, vocab, sources, penalties, kinds)
        top = block_maxima(maxima, x, vocab)
        if not can or not top > -INFINITY:
            fill(
                out, vocab, -INFINITY if can and top == -INFINITY and not as_probabilities else NAN
            )
            continue
        t, top_k, p, m = filters
        least, stop = prefix(maxima, masses, values, columns, x, vocab, top, t, top_k, p, m)
        exact = np.float64(t) if places[1] else numbers[0]
        if as_probabilities:
            probabilities = offset(pointer(out_at, wide), i * vocab)
            _write_probabilities(probabilities, x, vocab, top, exact, least, stop)
        else:
            _write_logits(out, x, vocab, top, exact, least, stop)


def filter_logits_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab], options as `_options.packed`, whether probabilities are wanted
    -> [batch, vocab], of the dtype of the logits; probabilities in fp32 or fp64."""
    rows, vocab = logits.shape
    as_probabilities = arguments[COUNT]
    dtype = wide_dtype(logits.dtype) if as_probabilities else logits.dtype
    out = logits.new_empty(rows, vocab, dtype=dtype)
    scratch = Scratch(logits, arguments)
    _filter(
        scratch.tasks, logits.numel(), address(out), address(logits), *packed(arguments),
        address(scratch.memory), scratch.places, row_kinds(logits, arguments), kind(out),
        rows, vocab, logits.stride(0), scratch.size, scratch.tasks, as_probabilities,
    )  # fmt: skip
    return out
