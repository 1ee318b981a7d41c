"""Layer normalisation as a module."""

from typing import Any

import torch
from torch import Tensor

from tilewise.nn.norm import flattened
from tilewise.ops.layer_norm import add_layer_norm, layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, its arguments and its state_dict, computed by `tilewise.layer_norm`.

    Args:
        normalized_shape: The last dims of `x`, which are normalised together.
        eps: Added to the variance.
        elementwise_affine: Whether there is a weight, that begins as `1 - weight_offset`.
        bias: Whether there is a bias, that begins as 0; only with a weight.
        device: Of the parameters.
        dtype: Theirs.
        weight_offset: Added to the weight.
        casting: "torch" or "llama", as in `tilewise.layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
        casting: str = "torch",
    ) -> None:
        self.weight_offset = weight_offset if elementwise_affine else 0.0
        self.casting = casting
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Scale by 1, and add nothing."""
        super().reset_parameters()
        if self.elementwise_affine and self.weight_offset:
            torch.nn.init.constant_(self.weight, 1 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, `[..., *normalized_shape]`."""
        shape, parameters = self.normalized_shape, (self.weight, self.bias)
        rows, weight, bias = flattened("layer_norm", shape, (x,), parameters)
        assert rows is not None
        return layer_norm(rows, weight, bias, self.eps, **self._options()).view(x.shape)

    def _options(self) -> dict[str, Any]:
        return {"weight_offset": self.weight_offset, "casting": self.casting}


class AddLayerNorm(LayerNorm):
    """`LayerNorm` of a sum, by `tilewise.add_layer_norm`: its arguments, its state_dict.

    Args:
        dropout_p: Probability with which an element of the branch is dropped in training.
    """

    def __init__(self, *args: Any, dropout_p: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Add the branch `x` to `residual`; return what is normalised, and the sum."""
        shape, parameters = self.normalized_shape, (self.weight, self.bias)
        rows, stream, weight, bias = flattened("add_layer_norm", shape, (x, residual), parameters)
        assert rows is not None and stream is not None
        y, total = add_layer_norm(
            rows, stream, weight, bias, self.eps, **self._options(),
            dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip
        return y.view(x.shape), total.view(x.shape)
