"""Cross-entropy from hidden states, without keeping their logits.

Chunks of tokens with their gradients at once: Hsu et al., 2024, https://arxiv.org/abs/2410.10989.
Logits computed once more instead: Wijmans et al., 2024, https://arxiv.org/abs/2411.09009.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.class_loss import (
    ClassLoss,
    check_classes,
    check_reduction,
    check_target,
    check_weight,
    divisor_of,
    factor_of,
    options_of,
    reduced,
    row_losses,
    with_sum,
)
from tilewise.linear_loss import MODES
from tilewise.op import (
    Inputs,
    Op,
    as_rows,
    autocast_dtype,
    backends_of,
    backward_is_last,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    memory: str = "fast",
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute the cross-entropy of linear logits, of which at most one copy is ever made.

        logits = hidden linear_weight^T + linear_bias
        loss = cross_entropy(logits, target), with all its options

    The gradients are computed with the loss, in three products, and only scaled in backward: but
    for `memory="min"` and for reduction "none", which compute the logits once more, from one number
    a row. Tensors that require no gradient cost no product. The loss alone costs one.

    Args:
        hidden: `[..., dim]`, floating point.
        linear_weight: `[classes, dim]`, dtype of `hidden`.
        target: `[...]`, int64, int32 or uint8.
        linear_bias: `[classes]`, dtype of `hidden`, or None.
        weight: `[classes]`, floating point, without gradient: of each class. None is all ones.
        ignore_index: The target of rows that do not count.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        z_loss: How much the square of the normaliser counts, at least 0.
        softcap: Above 0: no score is larger. None leaves them.
        logit_scale: Multiplies the logits, before `softcap`.
        reduction: "mean", "sum" or "none".
        denom: By what "mean" divides the sum: a number, or a tensor of one element.
        memory: "fast" makes the logits of all tokens at once; "lean" those of as many tokens as fit
            into 270 MB (56 MB on a CPU), with a fourth product for 16-bit weights; "min" takes
            110 MB and a sum of the gradient of `hidden` in fp32, and a fourth product.
        check_inputs: Raise where a target is no class. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        A scalar, or `[...]` with "none"; fp32 (fp64 for fp64 `hidden`).

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or an option is wrong or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    options = options_of(NAME, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check(hidden, linear_weight, target, linear_bias, memory)
    check_weight(NAME, weight, len(linear_weight), hidden.device)
    check_reduction(NAME, reduction, denom, hidden.device)
    if check_inputs:
        check_classes(NAME, target, ignore_index, len(linear_weight))
    target, lower = target.long(), autocast_dtype(hidden)
    if lower is not None:
        hidden, linear_weight = hidden.to(lower), linear_weight.to(lower)
        linear_bias = None if linear_bias is None else linear_bias.to(lower)
    shown = {"linear_bias": linear_bias, "weight": weight, "reduction": reduction, "denom": denom}
    chosen = choose(
        LINEAR_CROSS_ENTROPY, backend, hidden, linear_weight, target,
        **shown, **vars(options), memory=memory,
    )  # fmt: skip
    divisor = divisor_of(target, weight, ignore_index, reduction, denom)
    if chosen == "reference" or hidden.numel() == 0 or transforming():
        losses = _reference_losses(hidden, linear_weight, linear_bias, target, weight, options)
        return reduced(losses, reduction, divisor)

    rows, flat = as_rows(hidden), target.reshape(-1).contiguous()
    weights = with_sum(weight, hidden.dtype)
    tensors = rows, linear_weight, linear_bias
    loss: Tensor
    if needs_gradient(*tensors):
        wanted = tuple(t is not None and t.requires_grad for t in tensors)
        if isinstance(divisor, Tensor):
            divisor = divisor.detach()
        loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            *tensors, flat, weights, divisor, options, reduction, memory, wanted, chosen
        )
    else:
        losses, *_ = _forward(
            rows, linear_weight, flat, linear_bias, weights, None, *options.numbers(), memory,
            False, False, False, chosen,
        )  # fmt: skip
        loss = reduced(losses, reduction, divisor)
    return loss.view(target.shape) if reduction == "none" else loss


def _check(
    hidden: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, memory: str
) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"{NAME}: hidden must be floating point, got {hidden.dtype}")
    if hidden.ndim == 0:
        raise ValueError(f"{NAME}: hidden must be [..., dim], got a scalar")
    if linear_weight.ndim != 2 or linear_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{NAME}: linear_weight must be [classes, {hidden.shape[-1]}], "
            f"got {list(linear_weight.shape)}"
        )
    if len(linear_weight) == 0:
        raise ValueError(f"{NAME}: linear_weight must have at least one class, got none")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"{NAME}: linear_bias must be [{len(linear_weight)}], got {list(linear_bias.shape)}"
        )
    for word, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"{NAME}: {word} must be on {hidden.device}, got {tensor.device}")
        if tensor is not None and tensor.dtype != hidden.dtype and autocast_dtype(hidden) is None:
            raise TypeError(f"{NAME}: {word} must be {hidden.dtype}, got {tensor.dtype}")
    check_target(NAME, target, hidden.device)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{NAME}: hidden must be [..., dim] and target [...], "
            f"got {list(hidden.shape)} and {list(target.shape)}"
        )
    if memory not in MODES:
        raise ValueError(f"{NAME}: memory must be one of {', '.join(MODES)}, got {memory!r}")


def _reference_losses(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: ClassLoss,
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, linear_weight, linear_bias)
    return row_losses(logits, target, weight, options)[0]


def linear_cross_entropy_reference(
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    denom: Tensor | float | None = None,
    memory: str = "fast",
    **numbers: Any,
) -> Tensor:
    """The formula of `linear_cross_entropy`, in plain PyTorch."""
    options = ClassLoss(**numbers | {"softcap": numbers.get("softcap") or 0.0})
    losses = _reference_losses(hidden, linear_weight, linear_bias, target, weight, options)
    divisor = divisor_of(target, weight, options.ignore_index, reduction, denom)
    return reduced(losses, reduction, divisor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weights: Tensor | None,
        divisor: Tensor | float | None,
        options: ClassLoss,
        reduction: str,
        memory: str,
        wanted: tuple[bool, bool, bool],
        chosen: str,
    ) -> Tensor:
        now = reduction != "none" and memory != "min"
        factor = factor_of(divisor, hidden)
        losses, statistics, *gradients = _forward(
            hidden, linear_weight, target, linear_bias, weights, factor if now else None,
            *options.numbers(), memory, *(now and want for want in wanted), chosen,
        )  # fmt: skip
        ctx.save_for_backward(
            hidden, linear_weight, linear_bias, target, weights, factor, statistics, *gradients
        )
        ctx.options, ctx.memory, ctx.chosen, ctx.wanted = options, memory, chosen, wanted
        ctx.now = now
        return reduced(losses, reduction, divisor)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, linear_weight, linear_bias, target, weights, factor, known, *gradients = (
            ctx.saved_tensors
        )
        wanted, rest = ctx.wanted, (None,) * 8
        if torch.is_grad_enabled():  # create_graph=True
            weight = None if weights is None else weights[:-1]

            def reference(*tensors: Tensor | None) -> Tensor:
                hidden, linear_weight, linear_bias = tensors
                assert hidden is not None and linear_weight is not None
                return _reference_losses(
                    hidden, linear_weight, linear_bias, target, weight, ctx.options
                )

            dlosses = dloss if factor is None else dloss * factor
            tensors = hidden, linear_weight, linear_bias
            found: Sequence[Tensor | None] = differentiable_gradients(
                reference, dlosses.expand(hidden.shape[0]), tensors
            )
        elif ctx.now:
            if not backward_is_last():
                gradients = [gradient.clone() for gradient in gradients]
            _unit_backward(dloss, *gradients, ctx.chosen)
            found = gradients
        else:
            dlosses = dloss if factor is None else dloss * factor
            found = _backward(
                dlosses.expand(hidden.shape[0]).contiguous(), hidden, linear_weight, target,
                linear_bias, weights, known, *ctx.options.numbers(), ctx.memory, *wanted,
                ctx.chosen,
            )  # fmt: skip
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), *rest


BACKENDS = backends_of(NAME, cuda=takes_all, numba=takes_all, triton=takes_all)
OPTIONS = (
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale,"
    " str memory, bool want_hidden, bool want_weight, bool want_bias, str backend"
)


def _wanted_like(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, options: Sequence[Any]
) -> list[Tensor]:
    likes = hidden, linear_weight, linear_bias
    return [
        like.new_empty(like.shape) if want and like is not None else hidden.new_empty(0)
        for like, want in zip(likes, options[-4:-1], strict=True)
    ]


def _fake_forward(
    hidden: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    losses = hidden.new_empty(target.shape, dtype=wide_dtype(hidden.dtype))
    known = 0 if any(rest[-4:-1]) else target.shape[0]
    gradients = _wanted_like(hidden, linear_weight, linear_bias, rest)
    return losses, losses.new_empty(3, known), *gradients


_forward = register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor linear_weight, Tensor target,"
    f" Tensor? linear_bias, Tensor? weights, Tensor? factor, {OPTIONS})"
    " -> (Tensor losses, Tensor statistics, Tensor dhidden, Tensor dweight, Tensor dbias)",
    BACKENDS,
    fake=_fake_forward,
)
_backward = register(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor hidden, Tensor linear_weight,"
    f" Tensor target, Tensor? linear_bias, Tensor? weights, Tensor statistics, {OPTIONS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    BACKENDS,
    fake=lambda dlosses, hidden, linear_weight, target, linear_bias, *rest: tuple(
        _wanted_like(hidden, linear_weight, linear_bias, rest)
    ),
)
_unit_backward = register(
    "linear_cross_entropy_unit_backward(Tensor dloss, Tensor(a!) dhidden, Tensor(b!) dweight,"
    " Tensor(c!) dbias, str backend) -> ()",
    BACKENDS,
    fake=lambda *tensors: None,
)


def _inputs(
    tokens: int,
    dim: int,
    classes: int,
    ignored: int = 0,
    bias: bool = False,
    weighted: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    hidden = torch.randn(tokens, dim, device=device, dtype=dtype)
    linear_weight = (2 * torch.randn(classes, dim, device=device) / dim**0.5).to(dtype)
    target = torch.randint(classes, (tokens,), device=device)
    target[:ignored] = options.get("ignore_index", -100)
    if bias:
        options["linear_bias"] = torch.randn(classes, device=device, dtype=dtype)
    if weighted:
        options["weight"] = torch.rand(classes, device=device) + 0.5
    return (hidden, linear_weight, target), options


LINEAR_CROSS_ENTROPY = declare(
    Op(
        name=NAME,
        call=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"tokens": 6, "dim": 16, "classes": 40, "reduction": "none", "z_loss": 0.01},
            {"tokens": 33, "dim": 64, "classes": 200},
            {"tokens": 0, "dim": 16, "classes": 8, "reduction": "sum"},  # empty batch
            {"tokens": 5, "dim": 7, "classes": 1, "reduction": "sum"},  # loss 0, gradients 0
            {"tokens": 67, "dim": 48, "classes": 131, "ignored": 3},  # nothing is a whole tile
            {"tokens": 43, "dim": 32, "classes": 96, "memory": "min", "label_smoothing": 0.1},
            {"tokens": 20, "dim": 33, "classes": 70, "memory": "lean", "softcap": 4.0},
            {"tokens": 136, "dim": 32, "classes": 640, "weighted": True, "logit_scale": 0.5},
        ],
        workloads=[
            {"tokens": 1024, "dim": 768, "classes": 50257, "memory": "lean"},
            {"tokens": 1024, "dim": 768, "classes": 50257, "memory": "fast"},
        ],
        bytes_moved=lambda hidden, linear_weight, *rest, **options: (
            hidden.nbytes + linear_weight.nbytes
        ),
        flops=lambda hidden, linear_weight, *rest, **options: (
            2 * hidden.numel() * len(linear_weight)
        ),
    )
)
