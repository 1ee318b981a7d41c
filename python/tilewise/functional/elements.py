"""Embedding and what works on single elements, as in `torch.nn.functional`."""

import torch
from torch import Tensor

from tilewise.ops import embed as _embed
from tilewise.ops import gelu as _gelu
from tilewise.ops import glu as _glu

_torch = torch.nn.functional


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows of a table, as `torch.nn.functional.embedding`.

    PyTorch's own function runs for `max_norm`, `scale_grad_by_freq`, `sparse`, and tables that are
    empty or not of floating point. Otherwise an index of no row is a row of NaN, not an error.

    Args:
        input: `[...]`, int64 or int32.
        weight: `[rows, cols]`.
        padding_idx: A row of `weight`, from the end if negative, that gets no gradient.
        max_norm: Scales rows down, in place, whose norm is larger.
        norm_type: Of that norm.
        scale_grad_by_freq: Divides gradients by how often a row is named.
        sparse: Whether the gradient of `weight` is a sparse tensor.

    Returns:
        `[..., cols]`, dtype of `weight`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong, or `padding_idx` is no row.
        RuntimeError: If the devices differ.
    """
    theirs = max_norm is not None or scale_grad_by_freq or sparse
    if theirs or weight.numel() == 0 or not weight.is_floating_point():
        return _torch.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return _embed.embed(input, weight, padding_idx=padding_idx)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Multiply by the normal distribution function, as `torch.nn.functional.gelu`.

    Args:
        input: `[...]`, floating point.
        approximate: "none" for the exact function, or "tanh".

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If the dtype is wrong.
        ValueError: If `approximate` is unknown.
    """
    return _gelu.gelu(input, approximate)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Gate one half by the sigmoid of the other, as `torch.nn.functional.glu`.

    Args:
        input: `[...]`, floating point, of even size in `dim`: first what is gated, then the gate.
        dim: The dimension to halve.

    Returns:
        The shape of `input` with half the size in `dim`, its dtype.

    Raises:
        TypeError: If the dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if input.ndim == 0 or input.shape[dim] % 2:
        return _torch.glu(input, dim)
    up, gate = input.chunk(2, dim)
    return _glu.glu(gate, up, "sigmoid")
