"""Cross-entropy on the GPU: one program per row forward, one per block of a row backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import row_options

MAX_BLOCK = 8192  # classes: a row of any width goes through registers in blocks of at most this


@triton.jit
def _forward_kernel(
    losses_ptr, maxima_ptr, sums_ptr, logits_ptr, target_ptr,
    seq, classes, batch_stride, seq_stride, ignore_index, smoothing,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    logits_ptr += row // seq * batch_stride + row % seq * seq_stride
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)

    # The maximum so far, the sum of exp(x - maximum), and the sum of x for the smoothing.
    m = -float("inf")
    s = tl.where(counted, 0.0, 1.0)
    total = 0.0
    for start in range(0, tl.where(counted, classes, 0), BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < classes
        x = tl.load(logits_ptr + col, mask=mask, other=-float("inf")).to(tl.float32)
        new_m = tl.maximum(m, tl.max(x))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)  # exp(-inf - 0) is 0, not NaN
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift))
        m = new_m
        if SMOOTHING:
            total += tl.sum(tl.where(mask, x, 0.0))

    x_target = tl.load(logits_ptr + tl.where(valid, target, 0)).to(tl.float32)
    loss = tl.log(s) + (1 - smoothing) * (m - x_target)
    if SMOOTHING:
        loss += smoothing * (m - total / classes)
    loss = tl.where(valid, loss, float("nan"))

    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(maxima_ptr + row, m)
    tl.store(sums_ptr + row, s)


@triton.jit
def _backward_kernel(
    dlogits_ptr, dlosses_ptr, logits_ptr, target_ptr, maxima_ptr, sums_ptr,
    seq, classes, batch_stride, seq_stride, ignore_index, smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # From p = exp(x - m) / s: dx = (p - (1 - smoothing) * onehot - smoothing / classes) * dloss
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < classes
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    dloss = tl.load(dlosses_ptr + row)
    m = tl.load(maxima_ptr + row)
    s = tl.load(sums_ptr + row)
    x_ptr = logits_ptr + row // seq * batch_stride + row % seq * seq_stride
    read = tl.where(counted, classes, 0)
    x = tl.load(x_ptr + col, mask=col < read, other=0.0).to(tl.float32)

    p = tl.exp(x - m) / s - smoothing / classes
    dx = tl.where(col == target, p - (1 - smoothing), p) * dloss
    dx = tl.where(valid, dx, float("nan"))
    dx = tl.where(counted, dx, 0.0)

    tl.store(dlogits_ptr + row * classes + col, dx, mask=mask)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq] -> losses, maxima, sums [batch, seq]."""
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.float32)
    maxima, sums = torch.empty_like(losses), torch.empty_like(losses)
    _forward_kernel[(batch * seq,)](
        losses, maxima, sums, logits, target,
        seq, classes, logits.stride(0), logits.stride(1), ignore_index, label_smoothing,
        SMOOTHING=label_smoothing > 0, **row_options(min(classes, MAX_BLOCK)),
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
    options = row_options(min(classes, MAX_BLOCK))
    _backward_kernel[(batch * seq, triton.cdiv(classes, options["BLOCK"]))](
        dlogits, dlosses, logits, target, maxima, sums,
        seq, classes, logits.stride(0), logits.stride(1), ignore_index, label_smoothing,
        **options,
    )  # fmt: skip
    return dlogits
