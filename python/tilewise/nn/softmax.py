"""Softmax and its logarithm as modules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.ops.softmax import log_softmax, softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax`, computed by `tilewise.softmax`; `dim=None` is the last dimension.

    Args:
        dim: The dimension along which the results sum to one.
        options: `scale` and `softcap` of `tilewise.softmax`; along the last dimension all of them.
    """

    def __init__(self, dim: int | None = None, **options: Any) -> None:
        super().__init__(dim)
        self.options = options

    def forward(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Exponentials of the scores along `dim`, divided by their sum.

        `bias` and `mask`, as of `tilewise.softmax`, are for the last dimension alone.
        """
        return _along(softmax, x, self.dim, bias, mask, self.options)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax`, computed by `tilewise.log_softmax`; `dim=None` is the last one.

    Args:
        dim: The dimension along which the exponentials of the results sum to one.
        options: `scale` and `softcap` of `tilewise.log_softmax`; along the last dimension all.
    """

    def __init__(self, dim: int | None = None, **options: Any) -> None:
        super().__init__(dim)
        self.options = options

    def forward(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The logarithm of the softmax of the scores along `dim`.

        `bias` and `mask`, as of `tilewise.log_softmax`, are for the last dimension alone.
        """
        return _along(log_softmax, x, self.dim, bias, mask, self.options)


def _along(
    op: Callable[..., Tensor],
    x: Tensor,
    dim: int | None,
    bias: Tensor | None,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Run `op`, which works on the last dimension, along `dim`."""
    run = partial(op, **options)
    if dim in (None, -1, x.ndim - 1):
        return run(x, bias, mask=mask)
    if bias is not None or mask is not None or options.get("causal"):
        raise ValueError(
            f"{op.__name__}: dim must be the last with bias, mask or causal, got {dim}"
        )
    return run(x.movedim(dim, -1)).movedim(-1, dim)
