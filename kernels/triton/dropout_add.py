"""Dropout and a residual on the GPU: one program a block of elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._dropout import draw, dropped
from tilewise.kernels.triton._elements import element_block, element_options, element_start


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _forward_kernel(
    y_ptr, x_ptr, residual_ptr, seed_ptr, offset_ptr, seed, offset, threshold, scale,
    cols, x_stride, residual_stride,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    y = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    if DROPOUT:
        number, start = element_start(cols, GRAIN, BLOCK)
        y = dropped(
            y, number, start, seed_ptr, offset_ptr, seed, offset, threshold, scale,
            SEED_STRIDE, OFFSET_STRIDE, BLOCK,
        )  # fmt: skip
    if HAS_RESIDUAL:
        at = residual_ptr + row * residual_stride + col
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)

    tl.store(y_ptr + row * cols + col, y, mask=mask)


def _launch(
    y: Tensor, x: Tensor, residual: Tensor | None,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    beside = x if residual is None else residual
    grid, sizes, options = element_options(x, beside, keep_rows=True)
    numbers, strides = draw(p, seeds, offsets, seed, offset)
    _forward_kernel[grid](
        y, x, beside, *numbers, *sizes,
        HAS_RESIDUAL=residual is not None, **strides, **options,
    )  # fmt: skip
    return y


def dropout_add_forward(
    x: Tensor, residual: Tensor,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x, residual [rows, cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = residual.new_empty(x.shape)
    return _launch(y, x, residual, p, seeds, offsets, seed, offset)


def dropout_add_backward(
    dy: Tensor, p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dy [rows, cols], seeds and offsets [] or [rows] -> dx [rows, cols]."""
    dx = dy.new_empty(dy.shape, dtype=dtype)
    return _launch(dx, dy, None, p, seeds, offsets, seed, offset)
