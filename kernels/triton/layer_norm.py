"""LayerNorm on the GPU: what `_norm` does with a mean."""

from torch import Tensor

from tilewise.kernels.triton._dropout import NO_DROPOUT, draw
from tilewise.kernels.triton._norm import differentiate, normalise
from tilewise.kernels.triton._shared import SEARCH_SPACE as SEARCH_SPACE


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
) -> tuple[Tensor, ...]:
    """x [..., cols], weight, bias [cols] -> y [..., cols], mean, rstd [rows] fp32."""
    options = (eps, weight_offset, casting)
    return tuple(normalise(x, None, weight, bias, *options, NO_DROPOUT, centred=True))


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, ...]:
    """dy [rows, cols], x [..., cols], weight, bias [cols], mean, rstd [rows]
    -> dx [..., cols], dweight, dbias [cols], empty where they are not wanted."""
    wanted = (want_dx, False, want_dweight, want_dbias)
    inputs = (dy, None, x, weight, bias, mean, rstd)
    dx, _, dweight, dbias = differentiate(*inputs, weight_offset, NO_DROPOUT, wanted)
    return dx, dweight, dbias


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dropout_p: float,
    seeds: Tensor | None,
    offsets: Tensor | None,
    seed: int,
    offset: int,
) -> tuple[Tensor, ...]:
    """x, residual [rows, cols], weight, bias [cols] -> y, sum [rows, cols], mean, rstd [rows]."""
    dropout = draw(dropout_p, seeds, offsets, seed, offset)
    options = (eps, weight_offset, casting, dropout)
    return tuple(normalise(x, residual, weight, bias, *options, centred=True))


def add_layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    dropout_p: float,
    seeds: Tensor | None,
    offsets: Tensor | None,
    seed: int,
    offset: int,
    want_dx: bool,
    want_dresidual: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, ...]:
    """dy, dsum, sum [rows, cols], weight, bias [cols], mean, rstd [rows]
    -> dx, dresidual [rows, cols], dweight, dbias [cols], empty where they are not wanted."""
    dropout = draw(dropout_p, seeds, offsets, seed, offset)
    wanted = (want_dx, want_dresidual, want_dweight, want_dbias)
    inputs = (dy, dsum, total, weight, bias, mean, rstd)
    return tuple(differentiate(*inputs, weight_offset, dropout, wanted))
