"""Losses, as in `torch.nn.functional`."""

from typing import Any

import torch
from torch import Tensor

from tilewise.op import autocast_dtype
from tilewise.ops import cross_entropy as _cross_entropy
from tilewise.ops import linear_cross_entropy as _linear_cross_entropy

_torch = torch.nn.functional


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compare the softmax of logits with their targets, as `torch.nn.functional.cross_entropy`.

    PyTorch's own function runs for probabilities as targets, for class weights with a gradient,
    and for the deprecated `size_average` and `reduce`. Otherwise a target that is no class is a
    loss of NaN, not an error.

    Args:
        input: `[classes]`, `[batch, classes]` or `[batch, classes, ...]`, floating point.
        target: Class indices, int64 or uint8, the shape of `input` without classes; or
            probabilities, the shape of `input`.
        weight: `[classes]`, a factor for each class, dtype of `input`.
        size_average: Deprecated by PyTorch.
        ignore_index: The target of what does not count.
        reduce: Deprecated by PyTorch.
        reduction: "mean", "sum" or "none".
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.

    Returns:
        A scalar, or the shape of the indices with "none"; the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or an option is wrong.
        RuntimeError: If the devices differ.
    """
    indices = target.dtype in (torch.int64, torch.uint8) and input.ndim > 0
    weighed = weight is None or (weight.dtype == input.dtype and not weight.requires_grad)
    if not indices or not weighed or size_average is not None or reduce is not None:
        return _torch.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    loss = _cross_entropy.cross_entropy(
        input if input.ndim == 1 else input.movedim(1, -1),
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss if autocast_dtype(input) is not None else loss.to(input.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Compare linear logits with their targets, as `torch.nn.functional.linear_cross_entropy`.

    PyTorch's `linear` and our `cross_entropy` run for probabilities as targets and for weights of
    more than two dimensions; else our own op, which keeps no logits.

    Args:
        input: `[in_features]` or `[batch, in_features]`, floating point.
        linear_weight: `[classes, in_features]` or `[classes, ..., in_features]`.
        target: Class indices, int64 or uint8, `[]`, `[batch]` or `[batch, ...]`; or probabilities,
            the shape of the logits.
        linear_bias: `linear_weight` without its last dimension, or None.
        weight: `[classes]`, a factor for each class.
        reduction: "mean", "sum" or "none".
        ignore_index: The target of what does not count. None is -100.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        options: A `torch.nn.LinearCrossEntropyOptions`: then logits are made in parts, in as little
            memory as ours takes. None makes them all at once.

    Returns:
        A scalar, or the shape of the indices with "none"; the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or an option is wrong.
        RuntimeError: If the devices differ.
    """
    indices = target.dtype in (torch.int64, torch.uint8) and linear_weight.ndim == 2
    weighed = weight is None or not weight.requires_grad
    ignored = -100 if ignore_index is None else ignore_index
    if indices and weighed and target.shape == input.shape[:-1]:
        loss = _linear_cross_entropy.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            reduction=reduction,
            memory="fast" if options is None else "lean",
        )
        return loss if autocast_dtype(input) is not None else loss.to(input.dtype)
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    logits = _torch.linear(input, flat, bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    if target.shape == logits.shape and ignore_index is not None:
        raise ValueError(
            "linear_cross_entropy: ignore_index must be None for probabilities as targets, "
            f"got {ignore_index}"
        )
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
