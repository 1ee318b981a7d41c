"""What is done to rows of logits in CUDA C++: their losses, and the gradients of these.

A row's statistics are the maximum of its scores, the sum of exp(score - maximum), and 1 - p of the
true class.
"""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, stream

Numbers = tuple[int, float, float, float, float]


def row_losses(
    logits: Tensor, target: Tensor, weights: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [batch, seq, classes], target [batch, seq], weights [classes + 1]
    -> losses, lse [batch, seq], statistics [3, batch, seq]."""
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.float32)
    lse, statistics = torch.empty_like(losses), losses.new_empty(3, batch, seq)
    _cuda.cross_entropy_forward(
        address(losses), address(lse), address(statistics),
        address(logits), address(target), address(weights),
        batch * seq, seq, classes, logits.stride(0), logits.stride(1), *numbers,
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return losses, lse, statistics


def row_gradients(
    dlogits: Tensor,
    dlosses: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    statistics: Tensor,
    first: int,
    classes: int,
    numbers: Numbers,
) -> None:
    """Write dlogits [batch, seq, cols], which may be the logits: of classes `first` and on."""
    batch, seq, cols = logits.shape
    _cuda.cross_entropy_backward(
        address(dlogits), address(dlosses), address(dlse),
        address(logits), address(target), address(weights), address(statistics),
        batch * seq, seq, first, cols, classes,
        logits.stride(0), logits.stride(1), dlogits.stride(0), dlogits.stride(1), *numbers,
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip


def row_losses_and_gradients(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    dlosses: Tensor | None,
    numbers: Numbers,
) -> tuple[Tensor, Tensor]:
    """Put the gradients of the losses in the place of the logits.

    dlosses is [batch, seq], or a single number; None is 1. -> losses, lse [batch, seq].
    """
    batch, seq, classes = logits.shape
    losses = logits.new_empty(batch, seq, dtype=torch.float32)
    lse = torch.empty_like(losses)
    _cuda.cross_entropy_in_place(
        address(losses), address(lse), address(logits),
        address(dlosses), address(target), address(weights),
        batch * seq, seq, classes, logits.stride(0), logits.stride(1),
        int(dlosses is not None and dlosses.numel() > 1), *numbers,
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return losses, lse


def multiply_unless_one(x: Tensor, factor: Tensor) -> None:
    """x *= factor [] fp32, for contiguous x; without a look at x where that is 1."""
    _cuda.linear_cross_entropy_backward(
        address(x), address(factor), x.numel(), DTYPES[x.dtype], stream(x)
    )
