"""Cross-entropy in CUDA C++: a row is held by lanes, a block or a cluster, and read once."""

from torch import Tensor

from tilewise.kernels.cuda._logits import row_gradients, row_losses, row_losses_and_gradients


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weights: Tensor | None, *numbers: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq], weights [classes + 1]
    -> losses, lse [batch, seq], statistics [3, batch, seq]."""
    return row_losses(logits, target, weights, numbers)


def cross_entropy_backward(
    dlosses: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    statistics: Tensor,
    *numbers: float,
) -> Tensor:
    """As forward, and dlosses, dlse [batch, seq] -> dlogits, like logits."""
    dlogits = logits.new_empty(logits.shape)
    row_gradients(
        dlogits, dlosses, dlse, logits, target, weights, statistics, 0, logits.shape[-1], numbers
    )
    return dlogits


def cross_entropy_(
    logits: Tensor, target: Tensor, weights: Tensor | None, dlosses: Tensor | None, *numbers: float
) -> tuple[Tensor, Tensor]:
    """As forward, and dlosses [1]; overwrites logits with their gradient -> losses, lse."""
    return row_losses_and_gradients(logits, target, weights, dlosses, numbers)
