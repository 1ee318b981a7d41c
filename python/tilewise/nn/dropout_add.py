"""Dropout and a residual as a module."""

import torch
from torch import Tensor

from tilewise.ops.dropout_add import dropout_add


class DropoutAdd(torch.nn.Module):
    """Add a branch to the residual it came from, dropping out of the branch in training.

    Args:
        p: Probability of dropping an element of the branch.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + dropout(x)`, both of one shape."""
        return dropout_add(x, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
