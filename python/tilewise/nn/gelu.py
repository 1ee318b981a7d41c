"""The Gaussian error linear unit as modules."""

import torch
from torch import Tensor

from tilewise.ops.gelu import bias_gelu, gelu


class GELU(torch.nn.GELU):
    """`torch.nn.GELU`, computed by `tilewise.gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit to every element of `x`."""
        return gelu(x, self.approximate)


class BiasGELU(torch.nn.Module):
    """What follows a linear map without a bias: its bias, the unit, and dropout in training.

    Args:
        features: Of the last dimension.
        approximate: "none" or "tanh".
        dropout_p: Probability of dropping an element.
        device: Of the bias.
        dtype: Of the bias.
    """

    def __init__(
        self,
        features: int,
        approximate: str = "none",
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.approximate, self.dropout_p = approximate, dropout_p
        self.bias = torch.nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., features]` to the same."""
        dropout_p = self.dropout_p if self.training else 0.0
        return bias_gelu(x, self.bias, self.approximate, dropout_p=dropout_p)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, approximate={self.approximate!r}, dropout_p={self.dropout_p}"
