"""What is done to rows of logits on the CPU: their losses, and the gradients of these.

A block of a row is read from memory once, and what else there is to do with it is done in L1. From
the scores s = softcap * tanh(logit_scale * x / softcap) and a shift near their maximum:

    sum = sum_j exp(s_j - shift)        miss = sum over j != target of exp(s_j - shift) / sum

`miss` is 1 - p of the true class, of which no digit cancels. A row's statistics are these three.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._logit_blocks import (
    LOWEST,
    add_block,
    gradient_block,
    read_scores,
    score,
    slope,
    weighted_total,
)
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._shared import parts_for, wide_dtype
from tilewise.kernels.numba._simd import (
    address,
    exp,
    kind,
    load,
    offset,
    pointer,
    real,
    store,
)
from tilewise.kernels.numba._stream import finish_writes, streamed, write

BLOCK = np.int64(2048)  # classes

NAN = math.nan  # where the target of a row is no class: loud, and never an access out of bounds


# --- Rows.


@callee
def _statistics(row, scratch, weights, classes, true, smooth, weighted, plain, scale, cap):
    """The shift, the sum of powers without class `true`, the weighted sum of the scores."""
    shift, s, total = real(row, LOWEST), real(row, 0), real(row, 0)
    for start in range(0, classes, BLOCK):
        x, count = offset(row, start), min(classes - start, BLOCK)
        if plain:
            shift, s = add_block(x, count, true - start, shift, s)
        else:
            read_scores(scratch, x, count, scale, cap)
            shift, s = add_block(scratch, count, true - start, shift, s)
        if smooth:
            w = offset(weights, start) if weighted else weights
            if plain:
                total += weighted_total(x, count, w, weighted)
            else:
                total += weighted_total(scratch, count, w, weighted)
    return shift, s, total


@callee
def _loss(
    losses, lse, statistics, i, rows, row, scratch, weights, classes, t,
    weighted, plain, smoothing, z, scale, cap,
):  # fmt: skip
    """The loss and the statistics of a row that counts; its shift, sum, miss and lse."""
    one, zero = real(row, 1), real(row, 0)
    valid = 0 <= t < classes
    shift, others, total = _statistics(
        row, scratch, weights, classes, t, smoothing > zero, weighted, plain, scale, cap
    )
    true = score(row, t, scale, cap) if valid else zero
    power = exp(true - shift) if valid else zero
    s = others + power
    normaliser = shift + real(row, math.log(s))
    # log(s / power): its digits are those of the others where these are few.
    nll = shift - true + real(row, math.log(s))
    if others < power:
        nll = real(row, math.log1p(others / power))
    weight = load(weights, t) if weighted and valid else one
    loss = (one - smoothing) * weight * nll + z * normaliser * normaliser
    if smoothing > zero:
        weight_sum = load(weights, classes) if weighted else real(row, classes)
        loss += smoothing / real(row, classes) * (weight_sum * normaliser - total)
    miss = others / s
    store(losses, i, loss if valid else real(row, NAN))
    store(lse, i, normaliser)
    store(statistics, i, shift)
    store(statistics, rows + i, s)
    store(statistics, 2 * rows + i, miss)
    return shift, s, miss


@callee
def _gradient(
    dx, row, scratch, weights, first, cols, classes, t, shift, s, miss, dloss, dlse,
    weighted, plain, past_caches, smoothing, z, scale, cap,
):  # fmt: skip
    """The gradient of classes `first` and on, `cols` of `classes`; dx may be the row itself."""
    one, zero = real(row, 1), real(row, 0)
    lse = shift + real(row, math.log(s))
    weight = load(weights, t) if weighted else one
    weight_sum = load(weights, classes) if weighted else real(row, classes)
    pull = dloss * smoothing / real(row, classes)
    main = dloss * (one - smoothing) * weight
    rest = pull * weight_sum + real(row, 2) * dloss * z * lse + dlse
    push = (main + rest) / s
    # The true class by itself: p - 1 has no digit left where p is nearly 1.
    true, hit = t - first, zero
    if 0 <= true < cols:
        at = score(row, true, scale, cap)
        hit = rest * exp(at - shift) / s - main * miss - pull * weight
        hit *= slope(at, scale, cap)
    for start in range(0, cols, BLOCK):
        count = min(cols - start, BLOCK)
        w = offset(weights, first + start) if weighted else weights
        gradient_block(
            scratch, offset(row, start), count, w, weighted, plain, shift, push, pull, scale, cap
        )
        if start <= true < start + count:
            store(scratch, true - start, hit)
        write((offset(dx, start),), (scratch,), (), count, past_caches)


@callee
def _fill(dx, cols, value):
    for j in range(cols):
        store(dx, j, value)


# --- Launches.


@Kernel
def _losses(
    part, losses_at, lse_at, statistics_at, logits_at, target_at, weights_at, scratch_at,
    kind, wide, index, rows, seq, classes, batch_stride, seq_stride, parts, weighted, plain,
    ignore_index, smoothing, z, cap, scale,
):  # fmt: skip
    losses, lse, target = pointer(losses_at, wide), pointer(lse_at, wide), pointer(target_at, index)
    statistics, weights = pointer(statistics_at, wide), pointer(weights_at, wide)
    scratch = offset(pointer(scratch_at, wide), part * BLOCK)
    zero, one = real(kind, 0), real(kind, 1)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        t = load(target, i)
        if t == ignore_index:
            store(losses, i, zero)
            store(lse, i, zero)
            store(statistics, i, zero)
            store(statistics, rows + i, one)
            store(statistics, 2 * rows + i, zero)
            continue
        row = offset(pointer(logits_at, kind), i // seq * batch_stride + i % seq * seq_stride)
        _loss(
            losses, lse, statistics, i, rows, row, scratch, weights, classes, t, weighted, plain,
            real(kind, smoothing), real(kind, z), real(kind, scale), real(kind, cap),
        )  # fmt: skip


@Kernel
def _gradients(
    part, dlogits_at, dlosses_at, dlse_at, logits_at, target_at, weights_at, statistics_at,
    scratch_at, kind, wide, index, rows, seq, first, cols, classes, batch_stride, seq_stride,
    d_batch_stride, d_seq_stride, parts, weighted, plain, past_caches,
    ignore_index, smoothing, z, cap, scale,
):  # fmt: skip
    dlosses, dlse = pointer(dlosses_at, wide), pointer(dlse_at, wide)
    statistics, weights = pointer(statistics_at, wide), pointer(weights_at, wide)
    target = pointer(target_at, index)
    scratch = offset(pointer(scratch_at, wide), part * BLOCK)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        row = offset(pointer(logits_at, kind), i // seq * batch_stride + i % seq * seq_stride)
        dx = offset(pointer(dlogits_at, kind), i // seq * d_batch_stride + i % seq * d_seq_stride)
        t = load(target, i)
        if t == ignore_index or t < 0 or t >= classes:
            _fill(dx, cols, real(kind, 0 if t == ignore_index else NAN))
            continue
        _gradient(
            dx, row, scratch, weights, first, cols, classes, t,
            load(statistics, i), load(statistics, rows + i), load(statistics, 2 * rows + i),
            load(dlosses, i), load(dlse, i) if dlse_at else real(kind, 0),
            weighted, plain, past_caches,
            real(kind, smoothing), real(kind, z), real(kind, scale), real(kind, cap),
        )  # fmt: skip
    finish_writes()


@Kernel
def _losses_and_gradients(
    part, losses_at, lse_at, statistics_at, dlosses_at, logits_at, target_at, weights_at,
    scratch_at, kind, wide, index, rows, seq, classes, batch_stride, seq_stride, dloss_stride,
    parts, weighted, plain, ignore_index, smoothing, z, cap, scale,
):  # fmt: skip
    losses, lse, target = pointer(losses_at, wide), pointer(lse_at, wide), pointer(target_at, index)
    statistics, weights = pointer(statistics_at, wide), pointer(weights_at, wide)
    dlosses, scratch = pointer(dlosses_at, wide), offset(pointer(scratch_at, wide), part * BLOCK)
    zero = real(kind, 0)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        row = offset(pointer(logits_at, kind), i // seq * batch_stride + i % seq * seq_stride)
        t = load(target, i)
        if t == ignore_index:
            store(losses, i, zero)
            store(lse, i, zero)
            _fill(row, classes, zero)
            continue
        shift, s, miss = _loss(
            losses, lse, statistics, i, rows, row, scratch, weights, classes, t, weighted, plain,
            real(kind, smoothing), real(kind, z), real(kind, scale), real(kind, cap),
        )  # fmt: skip
        if t < 0 or t >= classes:
            _fill(row, classes, real(kind, NAN))
            continue
        dloss = load(dlosses, i * dloss_stride) if dlosses_at else real(kind, 1)
        _gradient(
            row, row, scratch, weights, 0, classes, classes, t, shift, s, miss, dloss, zero,
            weighted, plain, False,
            real(kind, smoothing), real(kind, z), real(kind, scale), real(kind, cap),
        )  # fmt: skip


# --- What the files of the ops call.

Numbers = tuple[int, float, float, float, float]


def _wide(logits: Tensor) -> torch.dtype:
    return wide_dtype(logits.dtype)


def row_losses(
    logits: Tensor, target: Tensor, weights: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq], weights [classes + 1]
    -> losses, lse [batch, seq], statistics [3, batch, seq]."""
    ignore_index, smoothing, z, cap, scale = numbers
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=_wide(logits))
    lse, statistics = torch.empty_like(losses), losses.new_empty(3, batch, seq)
    parts = parts_for(batch * seq)
    scratch = losses.new_empty(parts, int(BLOCK))
    _losses(
        parts, logits.numel(), address(losses), address(lse), address(statistics),
        address(logits), address(target), address(weights), address(scratch),
        kind(logits), kind(losses), kind(target),
        batch * seq, seq, classes, logits.stride(0), logits.stride(1), parts,
        weights is not None, cap == 0 and scale == 1, ignore_index, smoothing, z, cap, scale,
    )  # fmt: skip
    return losses, lse, statistics


def row_gradients(
    dlogits: Tensor,
    dlosses: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    statistics: Tensor,
    first: int,
    classes: int,
    numbers: Numbers,
) -> None:
    """Write dlogits [batch, seq, cols], which may be the logits: of classes `first` and on."""
    ignore_index, smoothing, z, cap, scale = numbers
    batch, seq, cols = logits.shape
    parts = parts_for(batch * seq)
    scratch = statistics.new_empty(parts, int(BLOCK))
    _gradients(
        parts, 2 * logits.numel(), address(dlogits), address(dlosses), address(dlse),
        address(logits), address(target), address(weights), address(statistics), address(scratch),
        kind(logits), kind(statistics), kind(target), batch * seq, seq, first, cols, classes,
        logits.stride(0), logits.stride(1), dlogits.stride(0), dlogits.stride(1), parts,
        weights is not None, cap == 0 and scale == 1,
        dlogits is not logits and streamed(dlogits),
        ignore_index, smoothing, z, cap, scale,
    )  # fmt: skip


def row_losses_and_gradients(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    dlosses: Tensor | None,
    numbers: Numbers,
) -> tuple[Tensor, Tensor]:
    """Put the gradients of the losses in the place of the logits.

    dlosses is [batch, seq], or a single number; None is 1. -> losses, lse [batch, seq].
    """
    ignore_index, smoothing, z, cap, scale = numbers
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=_wide(logits))
    lse, statistics = torch.empty_like(losses), losses.new_empty(3, batch, seq)
    parts = parts_for(batch * seq)
    scratch = losses.new_empty(parts, int(BLOCK))
    _losses_and_gradients(
        parts, 2 * logits.numel(), address(losses), address(lse), address(statistics),
        address(dlosses), address(logits), address(target), address(weights), address(scratch),
        kind(logits), kind(losses), kind(target),
        batch * seq, seq, classes, logits.stride(0), logits.stride(1),
        0 if dlosses is None or dlosses.numel() == 1 else 1, parts,
        weights is not None, cap == 0 and scale == 1, ignore_index, smoothing, z, cap, scale,
    )  # fmt: skip
    return losses, lse
