"""Cross-entropy on the CPU: rows in parallel, each read once from memory, block by block."""

import math

import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._shared import parts_for
from tilewise.kernels.numba._simd import (
    address,
    exp,
    kind,
    load,
    maximum,
    offset,
    pointer,
    real,
    store,
)

BLOCK = 2048  # classes: read for their maximum, then from L1 for their sum

# Where the target of a row is no class: loud, and never an access out of bounds.
NAN, LOWEST = math.nan, -math.inf


@Kernel
def _forward(
    part, losses_at, maxima_at, sums_at, logits_at, target_at,
    kind, wide, index, rows, seq, classes, batch_stride, seq_stride, parts,
    ignore_index, smoothing,
):  # fmt: skip
    losses, target = pointer(losses_at, wide), pointer(target_at, index)
    maxima, sums = pointer(maxima_at, wide), pointer(sums_at, wide)
    zero, lowest, eps = real(kind, 0), real(kind, LOWEST), real(kind, smoothing)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        t = load(target, i)
        if t == ignore_index:
            store(losses, i, zero)
            store(maxima, i, zero)
            store(sums, i, real(kind, 1))
            continue
        row = offset(pointer(logits_at, kind), i // seq * batch_stride + i % seq * seq_stride)

        # The maximum so far, the sum of exp(x - maximum), and the sum of x for the smoothing.
        m, s, total = lowest, zero, zero
        for start in range(0, classes, BLOCK):
            x, count = offset(row, start), min(classes - start, BLOCK)
            block_max, block_sum, block_total = lowest, zero, zero
            for j in range(count):
                block_max = maximum(block_max, load(x, j))
            if block_max > m:
                s *= exp(m - block_max)
                m = block_max
            shift = m if m > lowest else zero  # all -inf so far: exp(-inf - 0) is 0, not NaN
            for j in range(count):
                block_sum += exp(load(x, j) - shift)
            s += block_sum
            if eps > zero:
                for j in range(count):
                    block_total += load(x, j)
                total += block_total

        store(maxima, i, m)
        store(sums, i, s)
        if t < 0 or t >= classes:
            store(losses, i, real(kind, NAN))
            continue
        loss = math.log(s) + (real(kind, 1) - eps) * (m - load(row, t))
        if eps > zero:
            loss += eps * (m - total / real(kind, classes))
        store(losses, i, loss)


@Kernel
def _backward(
    part, dlogits_at, dlosses_at, logits_at, target_at, maxima_at, sums_at,
    kind, wide, index, rows, seq, classes, batch_stride, seq_stride, parts,
    ignore_index, smoothing,
):  # fmt: skip
    # From p = exp(x - m) / s: dx = (p - (1 - eps) * onehot - eps / classes) * dloss
    dlosses, target = pointer(dlosses_at, wide), pointer(target_at, index)
    maxima, sums = pointer(maxima_at, wide), pointer(sums_at, wide)
    eps = real(kind, smoothing)
    uniform = eps / real(kind, classes)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(logits_at, kind), i // seq * batch_stride + i % seq * seq_stride)
        dx = offset(pointer(dlogits_at, kind), i * classes)
        t, dloss = load(target, i), load(dlosses, i)
        m, scale = load(maxima, i), real(kind, 1) / load(sums, i)

        if t == ignore_index or t < 0 or t >= classes:
            filling = real(kind, 0 if t == ignore_index else NAN)
            for j in range(classes):
                store(dx, j, filling)
        else:
            for j in range(classes):
                store(dx, j, (exp(load(x, j) - m) * scale - uniform) * dloss)
            true = exp(load(x, t) - m) * scale - uniform - (real(kind, 1) - eps)
            store(dx, t, true * dloss)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq] -> losses, maxima, sums [batch, seq]."""
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.promote_types(logits.dtype, torch.float32))
    maxima, sums = torch.empty_like(losses), torch.empty_like(losses)
    rows = batch * seq
    parts = parts_for(rows)
    _forward(
        parts, logits.numel(), address(losses), address(maxima), address(sums),
        address(logits), address(target),
        kind(logits), kind(losses), kind(target),
        rows, seq, classes, logits.stride(0), logits.stride(1), parts,
        ignore_index, label_smoothing,
    )  # fmt: skip
    return losses, maxima, sums


def cross_entropy_backward(
    dlosses: Tensor,
    logits: Tensor,
    target: Tensor,
    maxima: Tensor,
    sums: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """All [batch, seq] but logits [batch, seq, classes] -> dlogits, like logits."""
    batch, seq, classes = logits.shape
    dlogits = logits.new_empty(batch, seq, classes)
    rows = batch * seq
    parts = parts_for(rows)
    _backward(
        parts, 2 * logits.numel(), address(dlogits),
        address(dlosses), address(logits), address(target), address(maxima), address(sums),
        kind(logits), kind(sums), kind(target),
        rows, seq, classes, logits.stride(0), logits.stride(1), parts,
        ignore_index, label_smoothing,
    )  # fmt: skip
    return dlogits
