"""Gated linear units as a module."""

import torch
from torch import Tensor

from tilewise.ops.glu import glu


class GLU(torch.nn.Module):
    """The gate of a feed-forward layer: `activation(gate) * up`, SwiGLU with "silu".

    `torch.nn.GLU` splits one tensor in two and gates the first half by the sigmoid of the second;
    here gate and up are two tensors, as two linear maps leave them.

    Args:
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid".
    """

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate `up` by `gate`, both of one shape."""
        return glu(gate, up, self.activation)

    def extra_repr(self) -> str:
        return repr(self.activation)
