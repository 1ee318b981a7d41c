"""Softmax and its logarithm as modules."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.ops.softmax import log_softmax, softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax`, computed by `tilewise.softmax`; `dim=None` is the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Exponentials of `x` along `dim`, divided by their sum."""
        return _along(softmax, x, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax`, computed by `tilewise.log_softmax`; `dim=None` is the last one."""

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the softmax of `x` along `dim`."""
        return _along(log_softmax, x, self.dim)


def _along(op: Callable[[Tensor], Tensor], x: Tensor, dim: int | None) -> Tensor:
    """Run `op`, which works on the last dimension, along `dim`."""
    if dim in (None, -1, x.ndim - 1):
        return op(x)
    return op(x.movedim(dim, -1)).movedim(-1, dim)
