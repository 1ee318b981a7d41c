"""LayerNorm in CUDA C++: a warp or a block per row, 16-byte accesses where the rows are aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, as_rows, parts_for, stream


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., cols], weight, bias [cols] -> y [..., cols], mean, rstd [rows] fp32."""
    shape, x = x.shape, as_rows(x)
    rows, cols = x.shape
    y = x.new_empty(shape)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _cuda.layer_norm_forward(
        address(y), address(mean), address(rstd), address(x), address(weight), address(bias),
        rows, cols, x.stride(0), eps,
        DTYPES[x.dtype], DTYPES[(x if weight is None else weight).dtype], stream(x),
    )  # fmt: skip
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
    shape, x = x.shape, as_rows(x)
    rows, cols = x.shape
    dx = x.new_empty(shape)
    if weight is None:
        parts, dweight, dbias = rows, x.new_empty(0), x.new_empty(0)
        weight_sums = bias_sums = None
    else:
        parts, dweight, dbias = (
            parts_for(rows, cols),
            weight.new_empty(cols),
            weight.new_empty(cols),
        )
        weight_sums, bias_sums = x.new_empty(2, parts, cols, dtype=torch.float32)
    _cuda.layer_norm_backward(
        address(dx), address(dweight), address(dbias), address(weight_sums), address(bias_sums),
        address(dy), address(x), address(weight), address(mean), address(rstd),
        rows, cols, dy.stride(0), x.stride(0), parts,
        DTYPES[x.dtype], DTYPES[(x if weight is None else weight).dtype], stream(x),
    )  # fmt: skip
    dweight = dweight if want_dweight else x.new_empty(0)
    dbias = dbias if want_dbias else x.new_empty(0)
    return dx if want_dx else x.new_empty(0), dweight, dbias
