"""GELU on the GPU: one program a block of elements, of some rows where their sum is wanted."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import activate
from tilewise.kernels.triton._dropout import draw, dropped
from tilewise.kernels.triton._elements import (
    element_block,
    element_options,
    element_start,
    in_grains,
)
from tilewise.kernels.triton._shared import MAX_PARTS, launch_options

_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}
PART_ELEMENTS = 2**19  # the shorter the rows, the more parts they are shared out to


@triton.jit
def _forward_kernel(
    y_ptr, x_ptr,
    cols, x_stride,
    ACTIVATION: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    y, _ = activate(x, ACTIVATION)

    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dx_ptr, dy_ptr, x_ptr,
    cols, dy_stride, x_stride,
    ACTIVATION: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)

    _, slope = activate(x, ACTIVATION)

    tl.store(dx_ptr + row * cols + col, dy * slope, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _bias_forward_kernel(
    y_ptr, x_ptr, bias_ptr, seed_ptr, offset_ptr, seed, offset, threshold, scale,
    cols, x_stride,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, DROPOUT: tl.constexpr,
    ACTIVATION: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)

    y, _ = activate(x + bias, ACTIVATION)
    if DROPOUT:
        number, start = element_start(cols, GRAIN, BLOCK)
        y = dropped(
            y, number, start, seed_ptr, offset_ptr, seed, offset, threshold, scale,
            SEED_STRIDE, OFFSET_STRIDE, BLOCK,
        )  # fmt: skip

    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _bias_backward_kernel(
    dx_ptr, dbias_parts_ptr, dy_ptr, x_ptr, bias_ptr,
    seed_ptr, offset_ptr, seed, offset, threshold, scale,
    rows, cols, dy_stride, x_stride,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, DROPOUT: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DBIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.cast(tl.program_id(1), tl.int64)
    start = tl.program_id(0) * BLOCK
    col = start + tl.arange(0, BLOCK)
    mask = col < cols * GRAIN
    bias = tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)

    for i in range(tl.program_id(1), rows, tl.num_programs(1)):
        row = tl.cast(i, tl.int64)
        at = row * GRAIN
        x = tl.load(x_ptr + at * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dx = tl.load(dy_ptr + at * dy_stride + col, mask=mask, other=0.0).to(tl.float32)

        _, slope = activate(x + bias, ACTIVATION)
        dx *= slope
        if DROPOUT:
            dx = dropped(
                dx, row, start, seed_ptr, offset_ptr, seed, offset, threshold, scale,
                SEED_STRIDE, OFFSET_STRIDE, BLOCK,
            )  # fmt: skip
        dbias += dx
        if WANT_DX:
            tl.store(dx_ptr + at * cols + col, dx, mask=mask)

    if WANT_DBIAS:
        tl.store(dbias_parts_ptr + part * GRAIN * cols + col, dbias, mask=mask)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x [rows, cols] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    grid, sizes, options = element_options(x)
    _forward_kernel[grid](y, x, *sizes, ACTIVATION=_NAMES[approximate], **options)
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy, x [rows, cols] -> dx [rows, cols]."""
    dx = x.new_empty(x.shape)
    grid, sizes, options = element_options(dy, x)
    _backward_kernel[grid](dx, dy, x, *sizes, ACTIVATION=_NAMES[approximate], **options)
    return dx


def bias_gelu_forward(
    x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias [cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    grid, sizes, options = element_options(x, keep_rows=True)
    numbers, strides = draw(dropout_p, seeds, offsets, seed, offset)
    _bias_forward_kernel[grid](
        y, x, bias, *numbers, *sizes,
        ACTIVATION=_NAMES[approximate], **strides, **options,
    )  # fmt: skip
    return y


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    want_dx: bool, want_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, x [rows, cols], bias [cols] -> dx [rows, cols], dbias [cols], or empty if not wanted."""
    rows, cols = x.shape
    dx = x.new_empty(x.shape if want_dx else 0)
    programs = min(rows, max(MAX_PARTS, PART_ELEMENTS // cols))
    parts = x.new_empty(programs if want_dbias else 0, cols, dtype=torch.float32)
    grain, sizes = in_grains(cols, dy.stride(0), x.stride(0))
    block = min(triton.next_power_of_2(cols), 1024)
    block = max(block, 4)  # a counter serves four columns
    numbers, strides = draw(dropout_p, seeds, offsets, seed, offset)
    _bias_backward_kernel[(triton.cdiv(cols, block), programs)](
        dx, parts, dy, x, bias, *numbers, rows, *sizes,
        WANT_DX=want_dx, WANT_DBIAS=want_dbias,
        ACTIVATION=_NAMES[approximate], GRAIN=grain, BLOCK=block, **strides,
        **launch_options(max(block // 256, 1)),
    )  # fmt: skip
    return dx, parts.sum(0).to(bias.dtype) if want_dbias else bias.new_empty(0)
