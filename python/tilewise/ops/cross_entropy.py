"""Cross-entropy of logits and class indices; the formula is in `tilewise.class_loss`."""

from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.class_loss import (
    ClassLoss,
    as_planes,
    check_logits,
    divisor_of,
    factor_of,
    options_of,
    reduced,
    row_losses,
    with_sum,
)
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


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compare the softmax of each row of `logits` with its target class.

        s = softcap * tanh(logit_scale * logits / softcap)
        lse = log(sum_j exp(s_j))
        loss = (1 - label_smoothing) * weight_target * (lse - s_target)
             + label_smoothing * mean_j(weight_j * (lse - s_j)) + z_loss * lse^2

    The logits are scaled first, then capped. They are read once forward and once backward, and no
    other tensor of their size is made but their gradient. A row whose target is `ignore_index` is
    not read: loss 0, gradient 0. A row whose target is no class has loss NaN and gradient NaN.

    Args:
        logits: `[..., classes]`, floating point. Copied only if the classes of a row do not lie
            side by side, or if more than two of its leading dimensions cannot be merged.
        target: `[...]`, int64, int32 or uint8, on the device of `logits`.
        weight: `[classes]`, floating point, without gradient. None is all ones.
        ignore_index: The target of rows that do not count.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        z_loss: How much the square of `lse` counts, at least 0. No class weight applies to it.
        softcap: Above 0: no score is larger. None leaves them.
        logit_scale: Multiplies the logits.
        reduction: "mean" over the rows that count, each by the weight of its target as in PyTorch
            (NaN if none does); "sum" or "none".
        denom: By what "mean" divides the sum instead: a number, or a tensor of one element, which
            stays on its device. For a batch in several parts.
        check_inputs: Raise where a target is no class. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        A scalar, or `[...]` with "none"; fp32 (fp64 for fp64 `logits`), also for half `logits`.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or an option is wrong or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    name = "cross_entropy"
    options = options_of(name, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_logits(name, logits, target, weight, options, reduction, denom, check_inputs)
    loss, _ = _losses(CROSS_ENTROPY, logits, target, weight, options, reduction, denom, backend)
    return loss


def cross_entropy_with_lse(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `cross_entropy`, and the logarithm of the sum of the exponentials of each row.

        lse = log(sum_j exp(s_j)), with s, the loss and all options as in `cross_entropy`

    Both have gradients. The lse of a row that does not count is 0.

    Args:
        logits: `[..., classes]`, floating point.
        target: `[...]`, int64, int32 or uint8, on the device of `logits`.
        weight: `[classes]`, floating point, without gradient. None is all ones.
        ignore_index: The target of rows that do not count.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        z_loss: How much the square of `lse` counts, at least 0.
        softcap: Above 0: no score is larger. None leaves them.
        logit_scale: Multiplies the logits, before `softcap`.
        reduction: Of the loss: "mean", "sum" or "none". The lse is never reduced.
        denom: By what "mean" divides the sum: a number, or a tensor of one element.
        check_inputs: Raise where a target is no class. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The loss, a scalar, or `[...]` with "none"; and lse, `[...]`. Both fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError, RuntimeError: As `cross_entropy`.
    """
    name = "cross_entropy_with_lse"
    options = options_of(name, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_logits(name, logits, target, weight, options, reduction, denom, check_inputs)
    return _losses(WITH_LSE, logits, target, weight, options, reduction, denom, backend)


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Overwrite `logits` with the gradient of their `cross_entropy`, and return that.

    What is written is the gradient of the loss as it is reduced (of the sum, with "none"), for an
    upstream gradient of 1. Nothing else of the size of the logits is made.

    Args:
        logits: `[..., classes]`, floating point, without gradient. The classes of a row lie side
            by side, no row is there twice, and more than two leading dimensions are contiguous.
        target: `[...]`, int64, int32 or uint8, on the device of `logits`.
        weight: `[classes]`, floating point, without gradient. None is all ones.
        ignore_index: The target of rows that do not count: their logits become 0.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        z_loss: How much the square of `lse` counts, at least 0.
        softcap: Above 0: no score is larger. None leaves them.
        logit_scale: Multiplies the logits, before `softcap`.
        reduction: "mean", "sum" or "none".
        denom: By what "mean" divides the sum: a number, or a tensor of one element.
        check_inputs: Raise where a target is no class. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The loss, without gradient.

    Raises:
        TypeError, RuntimeError: As `cross_entropy`.
        ValueError: As `cross_entropy`; and if `logits` require a gradient or lie otherwise.
    """
    name = "cross_entropy_"
    options = options_of(name, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_logits(name, logits, target, weight, options, reduction, denom, check_inputs)
    if needs_gradient(logits):
        raise ValueError(f"{name}: logits must be without gradient, got requires_grad=True")
    sizes = zip(logits.shape, logits.stride(), strict=True)
    twice = any(size > 1 and stride == 0 for size, stride in sizes)
    apart = logits.shape[-1] > 1 and logits.stride(-1) != 1
    if twice or apart or (logits.ndim > 3 and not logits.is_contiguous()):
        raise ValueError(
            f"{name}: logits must be rows of neighbouring elements, none of them twice, "
            f"got {list(logits.shape)} with strides {list(logits.stride())}"
        )
    target = target.long()
    shown = {"weight": weight, "reduction": reduction, "denom": denom} | vars(options)
    chosen = choose(CROSS_ENTROPY, backend, logits, target, **shown)
    divisor = divisor_of(target, weight, ignore_index, reduction, denom)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses, _ = row_losses(leaf, target, weight, options)
            loss = reduced(losses, reduction, divisor)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        logits.copy_(gradient)
        return loss.detach()

    factor = factor_of(divisor, logits)
    planes = as_planes(logits)
    flat = target.reshape(planes.shape[:2]).contiguous()
    weights = with_sum(weight, logits.dtype)
    losses, _ = _in_place(planes, flat, weights, factor, *options.numbers(), chosen)
    return reduced(losses.view(target.shape), reduction, divisor)


def _losses(
    op: Op,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: ClassLoss,
    reduction: str,
    denom: Tensor | float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and lse in the shape of `target`."""
    target = target.long()
    shown = {"weight": weight, "reduction": reduction, "denom": denom} | vars(options)
    chosen = choose(op, backend, logits, target, **shown)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        losses, lse = row_losses(logits, target, weight, options)
    else:
        planes = as_planes(logits)
        flat = target.reshape(planes.shape[:2]).contiguous()
        weights = with_sum(weight, logits.dtype)
        if needs_gradient(planes):
            losses, lse = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
                planes, flat, weights, options, chosen
            )
        else:
            losses, lse, _ = _forward(planes, flat, weights, *options.numbers(), chosen)
        losses, lse = losses.view(target.shape), lse.view(target.shape)
    divisor = divisor_of(target, weight, options.ignore_index, reduction, denom)
    return reduced(losses, reduction, divisor), lse


def cross_entropy_with_lse_reference(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    **numbers: Any,
) -> tuple[Tensor, Tensor]:
    """The formula of `cross_entropy_with_lse`, in plain PyTorch."""
    options = ClassLoss(**numbers | {"softcap": numbers.get("softcap") or 0.0})
    target = target.long()
    losses, lse = row_losses(logits, target, weight, options)
    divisor = divisor_of(target, weight, options.ignore_index, reduction, denom)
    return reduced(losses, reduction, divisor), lse


def cross_entropy_reference(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The formula of `cross_entropy`, in plain PyTorch."""
    return cross_entropy_with_lse_reference(logits, target, **options)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weights: Tensor | None,
        options: ClassLoss,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        losses, lse, statistics = _forward(logits, target, weights, *options.numbers(), chosen)
        ctx.save_for_backward(logits, target, weights, statistics)
        ctx.options, ctx.chosen = options, chosen
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    def backward(
        ctx: Any, dlosses: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, target, weights, statistics = ctx.saved_tensors
        if dlosses is None:
            dlosses = torch.zeros_like(statistics[0])
        if torch.is_grad_enabled():  # create_graph=True
            dlse = torch.zeros_like(dlosses) if dlse is None else dlse
            weight = None if weights is None else weights[:-1]

            def reference(logits: Tensor) -> tuple[Tensor, Tensor]:
                return row_losses(logits, target, weight, ctx.options)

            (dlogits,) = differentiable_gradients(reference, (dlosses, dlse), (logits,))
        else:
            dlogits = _backward(
                dlosses.contiguous(), None if dlse is None else dlse.contiguous(),
                logits, target, weights, statistics, *ctx.options.numbers(), ctx.chosen,
            )  # fmt: skip
        return dlogits, None, None, None, None


BACKENDS = backends_of("cross_entropy", cuda=takes_all, numba=takes_all, triton=takes_all)
NUMBERS = (
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale,"
    " str backend"
)


def _shapes(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = logits.new_empty(target.shape, dtype=wide_dtype(logits.dtype))
    return losses, torch.empty_like(losses), losses.new_empty((3, *target.shape))


# The softmax is kept as a shift near the maximum of a row and its sum of exp(score - shift), not as
# lse: added to a large maximum, the low bits of log(sum) would be missing from every gradient.
_forward = register(
    f"cross_entropy_forward(Tensor logits, Tensor target, Tensor? weights, {NUMBERS})"
    " -> (Tensor losses, Tensor lse, Tensor statistics)",
    BACKENDS,
    fake=_shapes,
)
_backward = register(
    "cross_entropy_backward(Tensor dlosses, Tensor? dlse, Tensor logits, Tensor target,"
    f" Tensor? weights, Tensor statistics, {NUMBERS}) -> Tensor dlogits",
    BACKENDS,
    fake=lambda dlosses, dlse, logits, *rest: logits.new_empty(logits.shape),
)
_in_place = register(
    "cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? weights, Tensor? dlosses,"
    f" {NUMBERS}) -> (Tensor losses, Tensor lse)",
    BACKENDS,
    fake=lambda *tensors: _shapes(*tensors)[:2],
)


def _inputs(
    rows: int,
    classes: int,
    ignored: int = 0,
    weighted: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    logits = 2 * torch.randn(rows, classes, device=device, dtype=dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[:ignored] = options.get("ignore_index", -100)
    if weighted:
        options["weight"] = torch.rand(classes, device=device) + 0.5
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
            {"rows": 7, "classes": 65, "ignored": 1, "ignore_index": 3, "z_loss": 0.1},
            {"rows": 5, "classes": 130, "ignored": 1, "label_smoothing": 0.2, "weighted": True},
            {"rows": 300, "classes": 33, "ignored": 40, "reduction": "mean", "weighted": True},
            {"rows": 67, "classes": 1000, "reduction": "sum", "label_smoothing": 0.1},
            {"rows": 3, "classes": 4099, "label_smoothing": 0.3, "weighted": True},  # some blocks
            {"rows": 2, "classes": 8193, "softcap": 3.0, "logit_scale": 1.5, "z_loss": 0.01},
        ],
        workloads=[
            {"rows": 1024, "classes": classes, "reduction": "mean"} for classes in (32000, 128256)
        ],
        bytes_moved=lambda logits, target, **options: logits.nbytes,
        native=torch.nn.functional.cross_entropy,
    )
)
WITH_LSE = declare(
    Op(
        name="cross_entropy_with_lse",
        call=cross_entropy_with_lse,
        reference=cross_entropy_with_lse_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "classes": 8},
            {"rows": 41, "classes": 65, "ignored": 1, "z_loss": 0.1},
            {"rows": 5, "classes": 130, "label_smoothing": 0.2, "weighted": True, "softcap": 5.0},
        ],
        workloads=[{"rows": 1024, "classes": 32000, "reduction": "mean"}],
        bytes_moved=lambda logits, target, **options: logits.nbytes,
    )
)
