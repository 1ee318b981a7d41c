"""Cross-entropy as a module."""

import torch
from torch import Tensor

from tilewise.ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, its arguments and its state_dict, by `tilewise.cross_entropy`.

    PyTorch's own runs for probabilities as targets.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input`, `[rows, classes, ...]` or `[classes]`, at `target` without classes.

        Returns:
            A scalar; with reduction "none" the loss of each target, in the shape of `target`.
        """
        if target.is_floating_point():
            return super().forward(input, target)
        return cross_entropy(
            input.movedim(1, -1) if input.ndim > 1 else input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )
