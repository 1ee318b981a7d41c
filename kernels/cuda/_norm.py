"""What RMSNorm and LayerNorm have in common: how their tensors go to `tilewise._cuda`."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, draw, parts_for, stream


def norm_forward(
    name: str,
    statistics: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
) -> tuple[Tensor, ...]:
    """x [..., cols], weight, bias [cols] -> y [..., cols], then mean and rstd, or rstd, [rows]."""
    x, rows, cols, places = _places(x)
    y = x.new_empty(x.shape)
    found = [x.new_empty(rows, dtype=torch.float32) for _ in range(statistics)]
    getattr(_cuda, f"{name}_forward")(
        address(y), *map(address, found), address(x), address(weight), address(bias),
        rows, cols, *places, eps, weight_offset, casting == "llama",
        DTYPES[x.dtype], _parameter_dtype(x, weight, bias), stream(x),
    )  # fmt: skip
    return y, *found


def norm_backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, ...],
    weight_offset: float,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, cols], x [..., cols], weight, bias [cols], statistics [rows]
    -> dx [..., cols], dweight, dbias [cols], each empty where it is not wanted."""
    x, rows, cols, places = _places(x)
    dx = x.new_empty(x.shape) if want_dx else None
    parts, grads, sums = _column_sums(x, rows, cols, (weight, want_dweight), (bias, want_dbias))
    getattr(_cuda, f"{name}_backward")(
        address(dx), *map(address, grads), *map(address, sums),
        address(dy), address(x), address(weight), *map(address, statistics),
        rows, cols, dy.stride(0), *places, parts, weight_offset,
        DTYPES[x.dtype], _parameter_dtype(x, weight, bias), stream(x),
    )  # fmt: skip
    return _there(x, dx, *grads)


def add_norm_forward(
    name: str,
    statistics: int,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dropout: tuple[float, Tensor | None, Tensor | None, int, int],
) -> tuple[Tensor, ...]:
    """x, residual [rows, cols], weight, bias [cols]
    -> y, sum [rows, cols], then mean and rstd, or rstd, [rows]."""
    rows, cols = x.shape
    y, total = x.new_empty(rows, cols), residual.new_empty(rows, cols)
    found = [x.new_empty(rows, dtype=torch.float32) for _ in range(statistics)]
    getattr(_cuda, f"add_{name}_forward")(
        address(y), address(total), *map(address, found),
        address(x), address(residual), address(weight), address(bias),
        rows, cols, x.stride(0), residual.stride(0),
        eps, weight_offset, casting == "llama", *draw(*dropout),
        DTYPES[residual.dtype], DTYPES[x.dtype], _parameter_dtype(x, weight, bias), stream(x),
    )  # fmt: skip
    return y, total, *found


def add_norm_backward(
    name: str,
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, ...],
    weight_offset: float,
    dropout: tuple[float, Tensor | None, Tensor | None, int, int],
    want_dx: bool,
    want_dresidual: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, dsum, total [rows, cols], weight, bias [cols], statistics [rows]
    -> dx, dresidual [rows, cols], dweight, dbias [cols], each empty where it is not wanted."""
    rows, cols = total.shape
    dx = dy.new_empty(rows, cols) if want_dx else None
    dresidual = total.new_empty(rows, cols) if want_dresidual else None
    parts, grads, sums = _column_sums(dy, rows, cols, (weight, want_dweight), (bias, want_dbias))
    getattr(_cuda, f"add_{name}_backward")(
        address(dx), address(dresidual), *map(address, grads), *map(address, sums),
        address(dy), address(dsum), address(total), address(weight), *map(address, statistics),
        rows, cols, dy.stride(0), 0 if dsum is None else dsum.stride(0), parts, weight_offset,
        *draw(*dropout),
        DTYPES[total.dtype], DTYPES[dy.dtype], _parameter_dtype(dy, weight, bias), stream(dy),
    )  # fmt: skip
    return _there(dy, dx, dresidual, *grads)


def _places(x: Tensor) -> tuple[Tensor, int, int, tuple[int, int, int, int, int]]:
    """`x`, or a copy if its elements have gaps or its rows more than three strides; how many rows
    it has and how long, and where they are: the inner sizes of [outer, middle, inner], and strides.
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    if x.ndim > 4 or x.stride(-1) != 1 or x.is_contiguous():
        x = x.contiguous()
        return x, rows, cols, (1, rows, 0, 0, cols)
    missing = 4 - x.ndim
    _, middle, inner = (*[1] * missing, *x.shape[:-1])
    return x, rows, cols, (middle, inner, *[0] * missing, *x.stride()[:-1])


def _column_sums(
    x: Tensor, rows: int, cols: int, *parameters: tuple[Tensor | None, bool]
) -> tuple[int, list[Tensor | None], list[Tensor | None]]:
    """How many parts the rows have, the gradients that are wanted, and the sums of the parts."""
    grads = [p.new_empty(cols) if wanted and p is not None else None for p, wanted in parameters]
    parts = rows if all(g is None for g in grads) else parts_for(rows, cols)
    return (
        parts,
        grads,
        [None if g is None else x.new_empty(parts, cols, dtype=torch.float32) for g in grads],
    )


def _parameter_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    return DTYPES[next((p.dtype for p in (weight, bias) if p is not None), x.dtype)]


def _there(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t for t in tensors)
