"""What is done to rows of logits on the GPU: their losses, and the gradients of these.

From the scores s = softcap * tanh(logit_scale * x / softcap) and their maximum, a row's statistics:

    sum = sum_j exp(s_j - maximum)      miss = sum over j != target of exp(s_j - maximum) / sum

`miss` is 1 - p of the true class, of which no digit cancels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import tanh
from tilewise.kernels.triton._shared import launch_options, row_options

MAX_BLOCK = 8192  # classes: a row of any width goes through registers in blocks of at most this


@triton.jit
def _scores(x, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """The scores, and their derivative."""
    slope = 1.0
    if SCALED:
        x = x * scale
        slope = scale
    if CAPPED:
        t = tanh(x / cap)
        x = cap * t
        slope = slope * (1.0 - t * t)
    return x, slope


@triton.jit
def _row_loss(
    x_ptr, weights_ptr, target, classes, stop, smoothing, z_loss, cap, scale,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a row whose classes are read up to `stop`, its lse and statistics."""
    valid = (target >= 0) & (target < classes)
    # Read before anything may be written where it lies.
    x_true = tl.load(x_ptr + tl.where(valid, target, 0)).to(tl.float32)

    # The maximum so far, the sum of exp(s - maximum) but for the true class, and that of s.
    m = -float("inf")
    others = 0.0
    total = 0.0
    for start in range(0, stop, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < stop
        x = tl.load(x_ptr + col, mask=mask, other=0.0).to(tl.float32)
        s, _ = _scores(x, scale, cap, SCALED, CAPPED)
        s = tl.where(mask, s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)  # exp(-inf - 0) is 0, not NaN
        power = tl.where(col == target, 0.0, tl.exp(s - shift))
        others = others * tl.exp(m - shift) + tl.sum(power)
        m = new_m
        if SMOOTHING:
            part = tl.where(mask, s, 0.0)
            if WEIGHTED:
                part *= tl.load(weights_ptr + col, mask=mask, other=0.0)
            total += tl.sum(part)

    m = tl.where(stop > 0, m, 0.0)
    s_true, _ = _scores(x_true, scale, cap, SCALED, CAPPED)
    power = tl.where(valid, tl.exp(s_true - m), 0.0)
    power = tl.where(stop > 0, power, 1.0)  # a row that does not count: sum 1, miss 0
    sum = others + power
    lse = m + tl.log(sum)
    # log(1 + v), with all digits where v is small, and log(sum / power)
    v = others / tl.where(others < power, power, 1.0)
    rounded = (1.0 + v) - 1.0
    near = tl.where(rounded == 0, v, tl.log(1.0 + v) * v / tl.where(rounded == 0, 1.0, rounded))
    nll = tl.where(others < power, near, m - s_true + tl.log(sum))
    weight_sum = classes * 1.0
    if WEIGHTED:
        nll *= tl.load(weights_ptr + tl.where(valid, target, 0))
        weight_sum = tl.load(weights_ptr + classes)
    loss = (1.0 - smoothing) * nll + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing / classes * (weight_sum * lse - total)
    loss = tl.where(valid, loss, float("nan"))
    return loss, lse, m, sum, others / sum


@triton.jit
def _coefficients(
    weights_ptr, target, classes, dloss, dlse, m, sum, miss, smoothing, z_loss,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What multiplies exp(s - m), what is subtracted, and the true class's part beside exp."""
    valid = (target >= 0) & (target < classes)
    weight = 1.0
    weight_sum = classes * 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + tl.where(valid, target, 0))
        weight_sum = tl.load(weights_ptr + classes)
    pull = dloss * smoothing / classes
    main = dloss * (1.0 - smoothing) * weight
    rest = pull * weight_sum + 2.0 * dloss * z_loss * (m + tl.log(sum)) + dlse
    return (main + rest) / sum, pull, rest / sum, main * miss


@triton.jit
def _gradient(
    x, col, mask, weights_ptr, first, target, m, push, pull, push_true, pull_true, cap, scale,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    s, slope = _scores(x, scale, cap, SCALED, CAPPED)
    power = tl.exp(s - m)
    # The true class by itself: p - 1 has no digit left where p is nearly 1.
    true = first + col == target
    g = tl.where(true, push_true * power - pull_true, push * power)
    if SMOOTHING:
        if WEIGHTED:
            g -= pull * tl.load(weights_ptr + first + col, mask=mask, other=0.0)
        else:
            g -= pull
    return g * slope


@triton.jit
def _losses_kernel(
    losses_ptr, lse_ptr, statistics_ptr, logits_ptr, target_ptr, weights_ptr,
    rows, seq, classes, batch_stride, seq_stride,
    ignore_index, smoothing, z_loss, cap, scale,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr = logits_ptr + row // seq * batch_stride + row % seq * seq_stride
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    loss, lse, m, sum, miss = _row_loss(
        x_ptr, weights_ptr, target, classes, tl.where(counted, classes, 0),
        smoothing, z_loss, cap, scale, SMOOTHING, WEIGHTED, SCALED, CAPPED, BLOCK,
    )  # fmt: skip
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(lse_ptr + row, tl.where(counted, lse, 0.0))
    tl.store(statistics_ptr + row, tl.where(counted, m, 0.0))
    tl.store(statistics_ptr + rows + row, sum)
    tl.store(statistics_ptr + 2 * rows + row, miss)


@triton.jit
def _gradients_kernel(
    dlogits_ptr, dlosses_ptr, dlse_ptr, logits_ptr, target_ptr, weights_ptr, statistics_ptr,
    rows, seq, first, cols, classes, batch_stride, seq_stride, d_batch_stride, d_seq_stride,
    ignore_index, smoothing, z_loss, cap, scale,
    HAS_DLSE: tl.constexpr,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    dlse = 0.0
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + row)
    m = tl.load(statistics_ptr + row)
    push, pull, push_true, pull_true = _coefficients(
        weights_ptr, target, classes, tl.load(dlosses_ptr + row), dlse, m,
        tl.load(statistics_ptr + rows + row), tl.load(statistics_ptr + 2 * rows + row),
        smoothing, z_loss, WEIGHTED,
    )  # fmt: skip
    x_ptr = logits_ptr + row // seq * batch_stride + row % seq * seq_stride
    read = tl.where(counted, cols, 0)
    x = tl.load(x_ptr + col, mask=col < read, other=0.0).to(tl.float32)
    dx = _gradient(
        x, col, mask, weights_ptr, first, target, m, push, pull, push_true, pull_true,
        cap, scale, SMOOTHING, WEIGHTED, SCALED, CAPPED,
    )  # fmt: skip
    dx = tl.where(valid, dx, float("nan"))
    dx = tl.where(counted, dx, 0.0)
    dx_ptr = dlogits_ptr + row // seq * d_batch_stride + row % seq * d_seq_stride
    tl.store(dx_ptr + col, dx, mask=mask)


@triton.jit
def _losses_and_gradients_kernel(
    losses_ptr, lse_ptr, dlosses_ptr, logits_ptr, target_ptr, weights_ptr,
    seq, classes, batch_stride, seq_stride, dloss_stride,
    ignore_index, smoothing, z_loss, cap, scale,
    HAS_DLOSSES: tl.constexpr,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr = logits_ptr + row // seq * batch_stride + row % seq * seq_stride
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    read = tl.where(counted, classes, 0)
    loss, lse, m, sum, miss = _row_loss(
        x_ptr, weights_ptr, target, classes, read,
        smoothing, z_loss, cap, scale, SMOOTHING, WEIGHTED, SCALED, CAPPED, BLOCK,
    )  # fmt: skip
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(lse_ptr + row, tl.where(counted, lse, 0.0))

    dloss = 1.0
    if HAS_DLOSSES:
        dloss = tl.load(dlosses_ptr + row * dloss_stride)
    push, pull, push_true, pull_true = _coefficients(
        weights_ptr, target, classes, dloss, 0.0, m, sum, miss, smoothing, z_loss, WEIGHTED
    )
    for start in range(0, classes, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < classes
        x = tl.load(x_ptr + col, mask=col < read, other=0.0).to(tl.float32)
        dx = _gradient(
            x, col, mask, weights_ptr, 0, target, m, push, pull, push_true, pull_true,
            cap, scale, SMOOTHING, WEIGHTED, SCALED, CAPPED,
        )  # fmt: skip
        dx = tl.where(valid, dx, float("nan"))
        tl.store(x_ptr + col, tl.where(counted, dx, 0.0), mask=mask)


@triton.jit
def _multiply_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(factor == 1.0, 0, count)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x * factor, mask=mask)


# --- What the files of the ops call.

Numbers = tuple[int, float, float, float, float]


def _flags(cols: int, weights: Tensor | None, numbers: Numbers) -> dict[str, int | bool]:
    _, smoothing, _, cap, scale = numbers
    return {
        "SMOOTHING": smoothing > 0, "WEIGHTED": weights is not None, "SCALED": scale != 1,
        "CAPPED": cap > 0, **row_options(min(cols, MAX_BLOCK)),
    }  # fmt: skip


def multiply_unless_one(x: Tensor, factor: Tensor) -> None:
    """x *= factor [], for contiguous x; without a look at x where that is 1."""
    count, block = x.numel(), 4096
    _multiply_kernel[(triton.cdiv(count, block),)](
        x, factor, count, BLOCK=block, **launch_options(8)
    )


def row_losses(
    logits: Tensor, target: Tensor, weights: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq], weights [classes + 1]
    -> losses, lse [batch, seq], statistics [3, batch, seq]."""
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.float32)
    lse, statistics = torch.empty_like(losses), losses.new_empty(3, batch, seq)
    _losses_kernel[(batch * seq,)](
        losses, lse, statistics, logits, target, weights,
        batch * seq, seq, classes, logits.stride(0), logits.stride(1), *numbers,
        **_flags(classes, weights, numbers),
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
    batch, seq, cols = logits.shape
    flags = _flags(cols, weights, numbers)
    _gradients_kernel[(batch * seq, triton.cdiv(cols, flags["BLOCK"]))](
        dlogits, dlosses, dlse, logits, target, weights, statistics,
        batch * seq, seq, first, cols, classes, logits.stride(0), logits.stride(1),
        dlogits.stride(0), dlogits.stride(1), *numbers,
        HAS_DLSE=dlse is not None, **flags,
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
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.float32)
    lse = torch.empty_like(losses)
    each = dlosses is not None and dlosses.numel() > 1
    _losses_and_gradients_kernel[(batch * seq,)](
        losses, lse, dlosses, logits, target, weights,
        seq, classes, logits.stride(0), logits.stride(1), int(each), *numbers,
        HAS_DLOSSES=dlosses is not None, **_flags(classes, weights, numbers),
    )  # fmt: skip
    return losses, lse
