"""Cross-entropy of linear logits in CUDA C++: products, and the kernels of rows between them."""

from torch import Tensor

from tilewise import linear_loss
from tilewise.kernels.cuda._logits import (
    multiply_unless_one,
    row_gradients,
    row_losses,
    row_losses_and_gradients,
)

ROOM = linear_loss.Room(row_losses, row_gradients, row_losses_and_gradients)


def linear_cross_entropy_forward(*arguments) -> tuple[Tensor, ...]:
    """As `linear_loss.forward`."""
    return linear_loss.forward(ROOM, *arguments)


def linear_cross_entropy_backward(*arguments) -> tuple[Tensor, ...]:
    """As `linear_loss.backward`."""
    return linear_loss.backward(ROOM, *arguments)


def linear_cross_entropy_unit_backward(
    dloss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor
) -> None:
    """Multiply each, in place, by dloss []; nothing is read or written if it is 1."""
    for gradient in (dhidden, dweight, dbias):
        if gradient.numel():
            multiply_unless_one(gradient, dloss)
