"""Root-mean-square normalisation as a module."""

from typing import Any

import torch
from torch import Tensor

from tilewise.nn.norm import flattened
from tilewise.ops.rms_norm import add_rms_norm, rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, its arguments and its state_dict, computed by `tilewise.rms_norm`.

    As there, `eps=None` is the machine epsilon of the dtype of `x`.

    Args:
        normalized_shape: The last dims of `x`, which are normalised together.
        eps: Added to the mean square.
        elementwise_affine: Whether there is a weight, that begins as `1 - weight_offset`.
        device: Of the parameters.
        dtype: Theirs.
        bias: Whether there is a bias, that begins as 0; only with a weight.
        weight_offset: Added to the weight: 1.0 for Gemma's.
        casting: "torch" or "llama", as in `tilewise.rms_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = False,
        weight_offset: float = 0.0,
        casting: str = "torch",
    ) -> None:
        self.weight_offset = weight_offset if elementwise_affine else 0.0
        self.casting = casting
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", None)
        if bias and elementwise_affine:
            self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        """Scale by 1, and add nothing."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1 - self.weight_offset)
        if (bias := getattr(self, "bias", None)) is not None:
            torch.nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, `[..., *normalized_shape]`."""
        shape, parameters = self.normalized_shape, (self.weight, self.bias)
        rows, weight, bias = flattened("rms_norm", shape, (x,), parameters)
        assert rows is not None
        y = rms_norm(rows, weight, self._eps(x), bias=bias, **self._options())
        return y.view(x.shape)

    def _eps(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def _options(self) -> dict[str, Any]:
        return {"weight_offset": self.weight_offset, "casting": self.casting}


class AddRMSNorm(RMSNorm):
    """`RMSNorm` of a sum, by `tilewise.add_rms_norm`: its arguments, its state_dict.

    Args:
        dropout_p: Probability with which an element of the branch is dropped in training.
    """

    def __init__(self, *args: Any, dropout_p: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Add the branch `x` to `residual`; return what is normalised, and the sum."""
        shape, parameters = self.normalized_shape, (self.weight, self.bias)
        rows, stream, weight, bias = flattened("add_rms_norm", shape, (x, residual), parameters)
        assert rows is not None and stream is not None
        y, total = add_rms_norm(
            rows, stream, weight, self._eps(x), bias=bias, **self._options(),
            dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip
        return y.view(x.shape), total.view(x.shape)
