"""GELU on the CPU: chunks of the elements in parallel, parts of the rows where a sum is wanted."""

from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels
from tilewise.kernels.numba._dropout import SCALE, draw, mark_kept
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._lanes import kept
from tilewise.kernels.numba._shared import partial_sums, sum_parts_for, summed, wide_dtype
from tilewise.kernels.numba._simd import address, kind, offset, pointer
from tilewise.kernels.numba._stream import CHUNK, finish_writes, loop_of, scratch, streamed

_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}


@forward_kernels
def _forward(activation):
    loop = loop_of(lambda x: (activation(x),))

    def chunk(task, y_at, x_at, kind, rows, cols, row_step, col_step, x_stride, past_caches):
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            x = offset(pointer(x_at, kind), i * x_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            loop((y,), (x,), (), width, past_caches)
        if past_caches:
            finish_writes()

    return chunk


@backward_kernels
def _backward(activation):
    loop = loop_of(lambda dy, x: (dy * activation(x)[1],))

    def chunk(
        task, dx_at, dy_at, x_at, kind, rows, cols, row_step, col_step, dy_stride, x_stride,
        past_caches,
    ):  # fmt: skip
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            x = offset(pointer(x_at, kind), i * x_stride + col)
            dy = offset(pointer(dy_at, kind), i * dy_stride + col)
            dx = offset(pointer(dx_at, kind), i * cols + col)
            loop((dx,), (dy, x), (), width, past_caches)
        if past_caches:
            finish_writes()

    return chunk


@forward_kernels
def _bias_forward(activation):
    loop = loop_of(lambda x, bias, factor: (kept(activation(x + bias), factor),))

    def chunk(
        task, y_at, x_at, bias_at, kind, bias_kind,
        rows, cols, row_step, col_step, x_stride, dropout, past_caches,
    ):  # fmt: skip
        factors = scratch(pointer(y_at, kind))
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        end = min(col + col_step, cols)
        for i in range(row, min(row + row_step, rows)):
            for start in range(col, end, CHUNK):
                x = offset(pointer(x_at, kind), i * x_stride + start)
                y = offset(pointer(y_at, kind), i * cols + start)
                bias = offset(pointer(bias_at, bias_kind), start)
                count = min(CHUNK, end - start)
                if dropout is None:
                    loop((y,), (x, bias, None), (), count, past_caches)
                else:
                    mark_kept(factors, start, count, i, dropout, dropout[SCALE])
                    loop((y,), (x, bias, factors), (), count, past_caches)
        if past_caches:
            finish_writes()

    return chunk


@backward_kernels
def _bias_backward(activation):
    def gradients(dy, x, bias, factor, dbias):
        dx = kept(dy * activation(x + bias)[1], factor)
        return dx, None if dbias is None else dbias + dx

    loop = loop_of(gradients, kept=1)

    def part(
        part, dx_at, dbias_at, dy_at, x_at, bias_at, kind, bias_kind, dx_kind, dbias_kind,
        rows, cols, sum_stride, dy_stride, x_stride, parts, dropout, past_caches,
    ):  # fmt: skip
        factors = scratch(pointer(dy_at, kind))
        for i in range(part * rows // parts, (part + 1) * rows // parts):
            for start in range(0, cols, CHUNK):
                x = offset(pointer(x_at, kind), i * x_stride + start)
                dy = offset(pointer(dy_at, kind), i * dy_stride + start)
                bias = offset(pointer(bias_at, bias_kind), start)
                dx = offset(pointer(dx_at, dx_kind), i * cols + start)
                dbias = offset(pointer(dbias_at, dbias_kind), part * sum_stride + start)
                count = min(CHUNK, cols - start)
                if dropout is None:
                    loop((dx, dbias), (dy, x, bias, None, dbias), (), count, past_caches)
                else:
                    mark_kept(factors, start, count, i, dropout, dropout[SCALE])
                    loop((dx, dbias), (dy, x, bias, factors, dbias), (), count, past_caches)
        if past_caches:
            finish_writes()

    return part


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x [rows, cols] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    tasks, *sizes = chunks(x)
    _forward[_NAMES[approximate]](
        tasks, x.numel(), address(y), address(x), kind(x), *sizes, x.stride(0), streamed(y)
    )
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy, x [rows, cols] -> dx [rows, cols]."""
    dx = x.new_empty(x.shape)
    tasks, *sizes = chunks(dy, x)
    _backward[_NAMES[approximate]](
        tasks, 2 * x.numel(), address(dx), address(dy), address(x),
        kind(x), *sizes, dy.stride(0), x.stride(0), streamed(dx),
    )  # fmt: skip
    return dx


def bias_gelu_forward(
    x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias [cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    dropout = draw(dropout_p, seeds, offsets, seed, offset) if dropout_p else None
    tasks, *sizes = chunks(x, keep_rows=True)
    _bias_forward[_NAMES[approximate]](
        tasks, x.numel(), address(y), address(x), address(bias),
        kind(x), kind(bias), *sizes, x.stride(0), dropout, streamed(y),
    )  # fmt: skip
    return y


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    want_dx: bool, want_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, x [rows, cols], bias [cols] -> dx [rows, cols], dbias [cols], or empty if not wanted."""
    rows, cols = x.shape
    parts = sum_parts_for(rows, cols)
    dx = x.new_empty(rows, cols) if want_dx else None
    wide = wide_dtype(x.dtype)
    sums = partial_sums(x, parts, wide) if want_dbias else None
    dropout = draw(dropout_p, seeds, offsets, seed, offset) if dropout_p else None
    _bias_backward[_NAMES[approximate]](
        parts, 2 * x.numel(), address(dx), address(sums), address(dy), address(x), address(bias),
        kind(x), kind(bias), None if dx is None else kind(dx), None if sums is None else kind(sums),
        rows, cols, 0 if sums is None else sums.shape[1], dy.stride(0), x.stride(0), parts,
        dropout, dx is not None and streamed(dx),
    )  # fmt: skip
    dbias = bias.new_empty(0) if sums is None else summed(sums, bias)
    return x.new_empty(0) if dx is None else dx, dbias
