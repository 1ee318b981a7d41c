"""Norms, as in `torch.nn.functional`."""

import math

import torch
from torch import Tensor

from tilewise.op import wide_dtype
from tilewise.ops import layer_norm as _layer_norm
from tilewise.ops import rms_norm as _rms_norm


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Scale to unit root-mean-square over the last dimensions, as `torch.nn.functional.rms_norm`.

    Args:
        input: `[..., *normalized_shape]`, floating point.
        normalized_shape: The last dimensions, over which to normalise.
        weight: `normalized_shape`; fp32, or the dtype of `input`. None is all ones.
        eps: Added to the mean square. None is the machine epsilon of the arithmetic, fp32 or fp64.

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong.
        RuntimeError: If the devices differ.
    """
    rows, (flat_weight,) = _flattened("rms_norm", input, normalized_shape, weight=weight)
    if eps is None:
        eps = torch.finfo(wide_dtype(input.dtype)).eps
    return _rms_norm.rms_norm(rows, flat_weight, eps).reshape(input.shape)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Bring to mean 0 and variance 1 over the last dimensions, as `torch.nn.functional.layer_norm`.

    Args:
        input: `[..., *normalized_shape]`, floating point.
        normalized_shape: The last dimensions, over which to normalise.
        weight: `normalized_shape`; fp32, or the dtype of `input`. None is all ones.
        bias: As `weight`, and of its dtype. None is all zeros.
        eps: Added to the variance.

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong.
        RuntimeError: If the devices differ.
    """
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    rows, (flat_weight, flat_bias) = _flattened(
        "layer_norm", input, normalized_shape, weight=weight, bias=bias
    )
    return _layer_norm.layer_norm(rows, flat_weight, flat_bias, eps).reshape(input.shape)


def _flattened(
    name: str, x: Tensor, shape: list[int], **parameters: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """`x` with its last dimensions as one, and the parameters as vectors."""
    size = tuple(shape)
    if not size or x.shape[-len(size) :] != size:
        raise ValueError(
            f"{name}: input must be [..., *normalized_shape], got {list(x.shape)} and {list(size)}"
        )
    for word, parameter in parameters.items():
        if parameter is not None and parameter.shape != size:
            raise ValueError(
                f"{name}: {word} must be normalized_shape, "
                f"got {list(parameter.shape)} and {list(size)}"
            )
    vectors = [None if p is None else p.reshape(-1) for p in parameters.values()]
    return x.reshape(*x.shape[: -len(size)], math.prod(size)), vectors
