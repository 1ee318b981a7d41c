"""Cross-entropy of logits and class indices, with label smoothing.

Label smoothing: Szegedy et al., 2015, https://arxiv.org/abs/1512.00567.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)

REDUCTIONS = ("mean", "sum", "none")

# torch splits longer sums among its threads, and their number would then show in the bits.
SUM_AT_ONCE = 1 << 14


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compare the softmax of each row of `logits` with its target class.

        lse = log(sum_j exp(logits_j))
        loss = lse - (1 - label_smoothing) * logits_target - label_smoothing * mean_j(logits_j)

    The logits are read once forward and once backward, and no other tensor of their size is made
    but their gradient. A row whose target is `ignore_index` is not read: loss 0, gradient 0. A row
    whose target is no class has loss NaN and gradient NaN.

    Args:
        logits: `[..., classes]`, floating point. Copied only if the classes of a row do not lie
            side by side, or if more than two of its leading dimensions cannot be merged.
        target: `[...]`, int64, on the device of `logits`.
        ignore_index: The target of rows that do not count.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        reduction: "mean" over the rows that count (NaN if none does), "sum" or "none".
        check_inputs: Raise where a target is no class. Waits for the device.
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        A scalar, or `[...]` with "none"; fp32 (fp64 for fp64 `logits`), also for half `logits`.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or an option is wrong or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check(logits, target, ignore_index, label_smoothing, reduction, check_inputs)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    chosen = choose(CROSS_ENTROPY, backend, logits, target, **options, reduction=reduction)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        return cross_entropy_reference(logits, target, **options, reduction=reduction)

    planes = _as_planes(logits)
    flat = target.reshape(planes.shape[:2]).contiguous()
    losses: Tensor
    if needs_gradient(planes):
        losses = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            planes, flat, ignore_index, label_smoothing, chosen
        )
    else:
        losses, *_ = _forward(planes, flat, ignore_index, label_smoothing, chosen)
    return _reduced(losses.view(target.shape), target, ignore_index, reduction)


def _check(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    check_inputs: bool,
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"cross_entropy: logits must be floating point, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target must be torch.int64, got {target.dtype}")
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits must be [..., classes], got a scalar")
    if logits.shape[-1] == 0:
        raise ValueError(
            f"cross_entropy: logits must have at least one class, got {list(logits.shape)}"
        )
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: logits must be [..., classes] and target [...], "
            f"got {list(logits.shape)} and {list(target.shape)}"
        )
    if target.device != logits.device:
        raise RuntimeError(f"cross_entropy: target must be on {logits.device}, got {target.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"cross_entropy: label_smoothing must be between 0 and 1, got {label_smoothing}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if check_inputs:
        _check_classes(target, ignore_index, logits.shape[-1])


def _check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    rows = wrong.flatten().nonzero()
    if len(rows):
        row = int(rows[0])
        raise ValueError(
            f"cross_entropy: target must be {ignore_index} or from 0 to {classes - 1}, "
            f"got {int(target.flatten()[row])} in row {row}"
        )


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The formula of `cross_entropy`, in plain PyTorch."""
    counted = target != ignore_index
    valid = (target >= 0) & (target < logits.shape[-1])
    wide = logits.to(wide_dtype(logits.dtype)).where(counted.unsqueeze(-1), 0.0)
    logprobs = torch.log_softmax(wide, -1)
    losses = -logprobs.gather(-1, target.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logprobs.mean(-1)
    # A factor, so that the gradient is NaN as well.
    losses = losses * torch.ones_like(losses).masked_fill(~valid & counted, math.nan)
    return _reduced(losses.where(counted, 0.0), target, ignore_index, reduction)


def _reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """In fp64: the loss of a batch, and of a whole model with it, is then wrong by one rounding."""
    if reduction == "none":
        return losses
    total = _sum_in_order(losses.flatten().double())
    total = total if reduction == "sum" else total / (target != ignore_index).sum()
    return total.to(losses.dtype)


def _sum_in_order(values: Tensor) -> Tensor:
    """The sum, its order the same whatever the number of threads."""
    while values.numel() > SUM_AT_ONCE:
        values = torch.nn.functional.pad(values, (0, -values.numel() % 128)).view(-1, 128).sum(1)
    return values.sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        label_smoothing: float,
        chosen: str,
    ) -> Tensor:
        losses: Tensor
        losses, *softmax = _forward(logits, target, ignore_index, label_smoothing, chosen)
        ctx.save_for_backward(logits, target, *softmax)
        ctx.options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        ctx.chosen = chosen
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, *softmax = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = partial(cross_entropy_reference, **ctx.options, reduction="none")
            dlogits, _ = differentiable_gradients(reference, dlosses, (logits, target))
        else:
            options = ctx.options.values()
            dlogits = _backward(
                dlosses.contiguous(), logits, target, *softmax, *options, ctx.chosen
            )
        return dlogits, None, None, None, None


def _as_planes(logits: Tensor) -> Tensor:
    """View `[..., classes]` as `[batch, seq, classes]`, the strides of the first two kept.

    So the logits of all tokens but the last of each sequence, which are no matrix, are not copied.
    """
    rows = logits if logits.ndim > 1 else logits.unsqueeze(0)
    planes = rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])
    return planes if planes.stride(-1) == 1 else planes.contiguous()


BACKENDS = backends_of("cross_entropy", numba=takes_all, triton=takes_all)


# The softmax is kept as the maximum of a row and its sum of exp(logits - maximum), not as their
# lse: added to a large maximum, the low bits of log(sum) would be missing from every gradient.
_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, float label_smoothing,"
    " str backend) -> (Tensor losses, Tensor maxima, Tensor sums)",
    BACKENDS,
    fake=lambda logits, target, ignore_index, label_smoothing, backend: tuple(
        logits.new_empty(target.shape, dtype=wide_dtype(logits.dtype)) for _ in range(3)
    ),
)
_backward = register(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor target, Tensor maxima,"
    " Tensor sums, int ignore_index, float label_smoothing, str backend) -> Tensor dlogits",
    BACKENDS,
    fake=lambda dlosses, logits, *rest: logits.new_empty(logits.shape),
)


def _inputs(
    rows: int,
    classes: int,
    ignored: int = 0,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    logits = 2 * torch.randn(rows, classes, device=device, dtype=dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[:ignored] = options.get("ignore_index", -100)
    return (logits, target), {"reduction": "none"} | options


CROSS_ENTROPY = declare(
    Op(
        name="cross_entropy",
        call=cross_entropy,
        reference=cross_entropy_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "classes": 8},
            {"rows": 0, "classes": 64},  # empty batch
            {"rows": 3, "classes": 1},  # one class: loss 0, gradient 0
            {"rows": 5, "classes": 127, "ignored": 2},
            {"rows": 7, "classes": 65, "ignored": 1, "ignore_index": 3},
            {"rows": 5, "classes": 130, "ignored": 1, "label_smoothing": 0.2},
            {"rows": 300, "classes": 33, "ignored": 40, "reduction": "mean"},
            {"rows": 67, "classes": 1000, "reduction": "sum", "label_smoothing": 0.1},
            {"rows": 2, "classes": 8193},  # several blocks, the last one of a single class
        ],
        workloads=[
            {"rows": 1024, "classes": classes, "reduction": "mean"} for classes in (32000, 128256)
        ],
        bytes_moved=lambda logits, target, **options: logits.nbytes,
        native=torch.nn.functional.cross_entropy,
    )
)
