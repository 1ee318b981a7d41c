"""Gated linear units as modules."""

import torch
from torch import Tensor

from tilewise.ops.glu import glu, glu_packed


class GLU(torch.nn.Module):
    """The gate of a feed-forward layer: `activation(gate) * up`, SwiGLU with "silu".

    `torch.nn.GLU` splits one tensor in two and gates the first half by the sigmoid of the second;
    here gate and up are two tensors, as two linear maps leave them.

    Args:
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid".
        limit: The most that gate may be, and up in size; None is no limit.
        alpha: silu is gate * sigmoid(alpha * gate).
        up_offset: Added to up.
    """

    def __init__(
        self,
        activation: str = "silu",
        *,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.limit, self.alpha, self.up_offset = limit, alpha, up_offset

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate `up` by `gate`, both of one shape."""
        return glu(
            gate, up, self.activation, limit=self.limit, alpha=self.alpha, up_offset=self.up_offset
        )

    def extra_repr(self) -> str:
        given = [repr(self.activation)]
        if self.limit is not None:
            given.append(f"limit={self.limit}")
        if self.alpha != 1:
            given.append(f"alpha={self.alpha}")
        if self.up_offset:
            given.append(f"up_offset={self.up_offset}")
        return ", ".join(given)


class PackedGLU(GLU):
    """`GLU` of the two halves of one tensor, the gate first, as one linear map leaves them."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Gate the second half of `x`, `[..., 2 * cols]`, by the first."""
        return glu_packed(
            x, self.activation, limit=self.limit, alpha=self.alpha, up_offset=self.up_offset
        )
