"""Cross-entropy as a module."""

import torch
from torch import Tensor

from tilewise.ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.Module):
    """`torch.nn.CrossEntropyLoss` of class indices, computed by `tilewise.cross_entropy`.

    Args:
        ignore_index: A target that does not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: The part of the probability spread over all classes.
    """

    def __init__(
        self, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of `logits`, `[rows, classes, ...]` or `[classes]`, at `target` without classes.

        Returns:
            A scalar; with reduction "none" the loss of each target, in the shape of `target`.
        """
        last = logits.movedim(1, -1) if logits.ndim > 1 else logits
        loss = cross_entropy(
            last.reshape(-1, last.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )
