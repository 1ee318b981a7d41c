"""LayerNorm in CUDA C++, alone and after an addition: a row is read once, by as many threads as
hold it, from 8 lanes of a warp to a cluster of blocks.
"""

from torch import Tensor

from tilewise.kernels.cuda._norm import (
    add_norm_backward,
    add_norm_forward,
    norm_backward,
    norm_forward,
)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., cols], weight, bias [cols] -> y [..., cols], mean, rstd [rows] fp32."""
    y, mean, rstd = norm_forward("layer_norm", 2, x, weight, bias, eps, weight_offset, casting)
    return y, mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, cols], x [..., cols], weight, bias [cols], mean, rstd [rows]
    -> dx [..., cols], dweight, dbias [cols], each empty where it is not wanted."""
    wanted = want_dx, want_dweight, want_dbias
    return norm_backward("layer_norm", dy, x, weight, bias, (mean, rstd), weight_offset, *wanted)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [rows, cols], weight, bias [cols], seeds, offsets [] or [rows]
    -> y, sum [rows, cols], mean, rstd [rows] fp32."""
    dropout = dropout_p, seeds, offsets, seed, offset
    y, total, mean, rstd = add_norm_forward(
        "layer_norm", 2, x, residual, weight, bias, eps, weight_offset, casting, dropout
    )
    return y, total, mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, dsum, total [rows, cols], weight, bias [cols], mean, rstd [rows]
    -> dx, dresidual [rows, cols], dweight, dbias [cols], each empty where it is not wanted."""
    dropout = dropout_p, seeds, offsets, seed, offset
    wanted = want_dx, want_dresidual, want_dweight, want_dbias
    return add_norm_backward(
        "layer_norm", dy, dsum, total, weight, bias, (mean, rstd), weight_offset, dropout, *wanted
    )
