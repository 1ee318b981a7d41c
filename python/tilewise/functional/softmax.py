"""Softmax and its logarithm, as in `torch.nn.functional`."""

import torch
from torch import Tensor

from tilewise.ops import softmax as _softmax

_torch = torch.nn.functional


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide exponentials by their sum over a dimension, as `torch.nn.functional.softmax`.

    PyTorch's own function runs for `dim=None`, which it deprecates, and for scalars.

    Args:
        input: `[...]`, floating point, or anything where there is a `dtype`.
        dim: The dimension along which the results sum to one. Copied where it is not the last.
        _stacklevel: For PyTorch's warning.
        dtype: To what `input` is cast first. None leaves it.

    Returns:
        The shape of `input`; `dtype`, or the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if dim is None or input.ndim == 0:
        return _torch.softmax(input, dim, _stacklevel + 1, dtype)
    x = input if dtype is None else input.to(dtype)
    return _softmax.softmax(x.movedim(dim, -1)).movedim(-1, dim)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Take the logarithm of the softmax over a dimension, as `torch.nn.functional.log_softmax`.

    PyTorch's own function runs for `dim=None`, which it deprecates, and for scalars.

    Args:
        input: `[...]`, floating point, or anything where there is a `dtype`.
        dim: The dimension along which the exponentials of the results sum to one. Copied where it
            is not the last.
        _stacklevel: For PyTorch's warning.
        dtype: To what `input` is cast first. None leaves it.

    Returns:
        The shape of `input`; `dtype`, or the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if dim is None or input.ndim == 0:
        return _torch.log_softmax(input, dim, _stacklevel + 1, dtype)
    x = input if dtype is None else input.to(dtype)
    return _softmax.log_softmax(x.movedim(dim, -1)).movedim(-1, dim)
