"""The Gaussian error linear unit as a module."""

import torch
from torch import Tensor

from tilewise.ops.gelu import gelu


class GELU(torch.nn.GELU):
    """`torch.nn.GELU`, computed by `tilewise.gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit to every element of `x`."""
        return gelu(x, self.approximate)
