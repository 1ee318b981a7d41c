"""How the norms are launched: several rows a program, one, or a row in blocks, by its width."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tilewise.kernels.triton._norm_tile import _backward_kernel, _forward_kernel
from tilewise.kernels.triton._norm_wide import (
    _backward_wide_kernel,
    _dweight_wide_kernel,
    _forward_wide_kernel,
)
from tilewise.kernels.triton._shared import MAX_PARTS, WIDE_ROW, WIDEST_BLOCK, launch_options

TILE = 2048  # elements of several narrow rows, four warps' work
WIDEST_FORWARD = 16384  # columns that a program can hold in registers forward


def tile_options(rows: int, cols: int) -> dict[str, int]:
    """Rows of at most half a tile share a program; of a wider one 512 elements are a warp's."""
    block = max(triton.next_power_of_2(cols), 16)
    together = min(max(TILE // block, 1), triton.next_power_of_2(rows))
    warps = min(max(block * together // 512, 1), 16)
    return {"ROWS": together, "BLOCK": block, **launch_options(warps)}


def _grid_of(x: Tensor) -> tuple[int, ...]:
    """Sizes of the middle and the inner of the dims of rows, and the strides of all three."""
    if x.ndim == 2:
        return 1, 1, x.stride(0), 0, 0
    if x.ndim == 3:
        return 1, x.shape[1], x.stride(0), 0, x.stride(1)
    return x.shape[1], x.shape[2], x.stride(0), x.stride(1), x.stride(2)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _unit(*lengths: int) -> int:
    """8 where it divides all these, so that the compiler can be told."""
    return 8 if all(length % 8 == 0 for length in lengths) else 1


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dropout: tuple[tuple, dict[str, int]],
    centred: bool,
) -> list[Tensor]:
    """x [..., cols], residual [rows, cols], weight, bias [cols]
    -> y [..., cols], sum [rows, cols] if there is a residual, mean [rows] if centred, rstd [rows].
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    y = x.new_empty(x.shape)
    total = None if residual is None else residual.new_empty(residual.shape)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    middle, inner, *strides = _grid_of(x)
    beside = _stride(residual)
    unit = _unit(cols, *strides, beside)
    arguments, constants = dropout
    tensors = (y, total, mean, rstd, x, residual, weight, bias)
    rest = (
        cols // unit, middle, inner, *(s // unit for s in strides), beside // unit,
        eps, weight_offset, *arguments,
    )  # fmt: skip
    constants = {
        "UNIT": unit, "GRID": middle * inner > 1, "LLAMA": casting == "llama", **constants
    }  # fmt: skip
    if cols <= WIDEST_FORWARD:
        options = tile_options(rows, cols)
        programs = triton.cdiv(rows, options["ROWS"])
        _forward_kernel[(programs,)](*tensors, rows, *rest, **constants, **options)
    else:
        _forward_wide_kernel[(rows,)](*tensors, *rest, **constants, **WIDE_ROW)
    return [out for out in (y, total, mean, rstd) if out is not None]


def differentiate(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    dropout: tuple[tuple, dict[str, int]],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """dy, dsum [rows, cols], x [..., cols] (or the sum), weight [cols], mean, rstd [rows]
    -> dx, dresidual [..., cols], dweight, dbias [cols], empty where they are not `wanted`."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    dx = dy.new_empty(x.shape) if wanted[0] else None
    dresidual = x.new_empty(x.shape) if wanted[1] else None
    options = tile_options(rows, cols) if cols <= WIDEST_BLOCK else {"ROWS": 1}
    programs = min(triton.cdiv(rows, options["ROWS"]), MAX_PARTS)
    parts = [x.new_empty(programs, cols, dtype=torch.float32) if w else None for w in wanted[2:]]
    middle, inner, *strides = _grid_of(x)
    unit = _unit(cols, *strides, dy.stride(0), _stride(dsum))
    width, dy_stride, dsum_stride = (n // unit for n in (cols, dy.stride(0), _stride(dsum)))
    grid = (middle, inner, *(s // unit for s in strides))
    arguments, constants = dropout
    shape = {"UNIT": unit, "GRID": middle * inner > 1}
    if cols <= WIDEST_BLOCK:
        _backward_kernel[(programs,)](
            dx, dresidual, *parts, dy, dsum, x, weight, mean, rstd,
            rows, width, dy_stride, dsum_stride, *grid, weight_offset, *arguments,
            **shape, **constants, **options,
        )  # fmt: skip
    else:
        if any(wanted[:2]):
            _backward_wide_kernel[(rows,)](
                dx, dresidual, dy, dsum, x, weight, mean, rstd,
                width, dy_stride, dsum_stride, *grid, weight_offset, *arguments,
                **shape, **constants, **WIDE_ROW,
            )  # fmt: skip
        if any(wanted[2:]):
            blocks = triton.cdiv(cols, WIDE_ROW["BLOCK"])
            _dweight_wide_kernel[(programs, blocks)](
                *parts, dy, x, mean, rstd, rows, width, dy_stride, *grid, **shape, **WIDE_ROW
            )
    grads = [
        x.new_empty(0) if sums is None else sums.sum(0).to(like.dtype)
        for sums, like in zip(parts, (weight, bias), strict=True)
    ]
    empty = (dy.new_empty(0), x.new_empty(0))
    return [e if t is None else t for t, e in zip((dx, dresidual), empty, strict=True)] + grads
