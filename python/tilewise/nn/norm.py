"""What the norm modules share: several normalised dims are one to an op."""

import math

from torch import Tensor


def flattened(
    op: str,
    shape: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    parameters: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """`tensors` `[..., *shape]` and `parameters` `shape`, with the dims of `shape` as one.

    Raises:
        ValueError: If the first of the tensors does not end in `shape`.
    """
    x = tensors[0]
    if x.shape[max(x.ndim - len(shape), 0) :] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{op}: x must be [..., {wanted}], got {list(x.shape)}")
    if len(shape) == 1:
        return (*tensors, *parameters)
    cols = math.prod(shape)
    rows = (t.reshape(*t.shape[: t.ndim - len(shape)], cols) for t in tensors)
    return (*rows, *(None if p is None else p.reshape(cols) for p in parameters))
