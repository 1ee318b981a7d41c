"""Layer normalisation as a module."""

import torch
from torch import Tensor

from tilewise.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, its arguments and its state_dict, computed by `tilewise.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, `[..., *normalized_shape]`."""
        shape = self.normalized_shape
        if x.shape[x.ndim - len(shape) :] != shape:
            raise ValueError(
                f"layer_norm: x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}"
            )
        if len(shape) == 1:
            return layer_norm(x, self.weight, self.bias, self.eps)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        return layer_norm(x.flatten(-len(shape)), weight, bias, self.eps).view(x.shape)
