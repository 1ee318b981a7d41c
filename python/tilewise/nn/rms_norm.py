"""Root-mean-square normalisation as a module."""

import torch
from torch import Tensor

from tilewise.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, its arguments and its state_dict, computed by `tilewise.rms_norm`.

    As there, `eps=None` is the machine epsilon of the dtype of `x`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, `[..., *normalized_shape]`."""
        shape = self.normalized_shape
        if x.shape[x.ndim - len(shape) :] != shape:
            raise ValueError(
                f"rms_norm: x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}"
            )
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if len(shape) == 1:
            return rms_norm(x, self.weight, eps)
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(x.flatten(-len(shape)), weight, eps).view(x.shape)
