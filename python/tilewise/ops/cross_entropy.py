"""Cross-entropy of logits and class indices."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Minus the log-softmax of each row of `logits` at its target."""
    return cross_entropy_reference(
        logits,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The formula of `cross_entropy`, in plain PyTorch."""
    wide = logits.to(wide_dtype(logits.dtype))
    return torch.nn.functional.cross_entropy(
        wide,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
