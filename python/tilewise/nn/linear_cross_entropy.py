"""Cross-entropy of linear logits as a module."""

import torch
from torch import Tensor

from tilewise.ops.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear map to logits and their loss, computed by `tilewise.linear_cross_entropy`.

    The names, the arguments and the state_dict of `torch.nn.LinearCrossEntropyLoss` (from 2.13 on)
    for targets that are classes; `memory` stands in the place of its options.

    Args:
        in_features: Of each input.
        num_classes: How many classes there are.
        bias: Whether the linear map has one.
        device: Of the parameters.
        dtype: Of the parameters.
        reduction: "mean", "sum" or "none".
        weight: `[num_classes]`, a factor for each class, or None.
        ignore_index: A target that does not count. None is -100.
        label_smoothing: The part of the probability spread over all classes.
        memory: "fast", "lean" or "min".
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.memory = memory

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input`, `[..., in_features]`, at the classes `target`, `[...]`.

        Returns:
            A scalar; with reduction "none" the loss of each target, in the shape of `target`.
        """
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            memory=self.memory,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, memory={self.memory!r}"
        )
