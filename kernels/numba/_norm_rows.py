"""The passes of a norm over a row. A pointer that is None leaves its term out."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import kept
from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import arithmetic_of, load, offset, real, reciprocal_root
from tilewise.kernels.numba._stream import (
    CHUNK,
    emit_loop,
    emit_read,
    emit_rounded,
    emit_spread,
    emit_write,
    loop_of,
    sums_of,
)


@callee
def row_statistics(x, cols, eps, means):
    """mean, 0 where there are no `means`, and 1 / sqrt(var + eps).

    The sums of chunks are added in fp64: of a row of 262144, 256 of them.
    """
    mean, left, square_sum = real(x, 0), 0.0, 0.0
    if means is None:
        for start in range(0, cols, CHUNK):
            part, chunk = real(x, 0), offset(x, start)
            for j in range(min(CHUNK, cols - start)):
                v = load(chunk, j)
                part += v * v
            square_sum += part
    else:
        total = 0.0
        for start in range(0, cols, CHUNK):
            part, chunk = real(x, 0), offset(x, start)
            for j in range(min(CHUNK, cols - start)):
                part += load(chunk, j)
            total += part
        mean = real(x, total / cols)
        for start in range(0, cols, CHUNK):
            part, moved, chunk = real(x, 0), real(x, 0), offset(x, start)
            for j in range(min(CHUNK, cols - start)):
                centred = load(chunk, j) - mean
                moved += centred
                part += centred * centred
            left += moved
            square_sum += part
        left /= cols  # by what rounding has moved a large mean
        mean = real(x, mean + left)
    variance = square_sum / cols - left * left
    return mean, reciprocal_root(real(x, variance + eps))


def _added(x, residual, factor):
    x = kept(x, factor)
    total = x if residual is None else x + residual
    return total, total


add_row = loop_of(_added, kept=1)  # x * factors + residual, and the same again or None


@intrinsic
def write_row(
    typing_context, y, x, weight, bias, mean, rstd, weight_offset, count, llama, past_caches
):
    """y = (x - mean) * rstd * (weight_offset + weight) + bias; `llama` rounds at each step."""
    wide = arithmetic_of(y.dtype)

    def emit(context, builder, signature, args):
        y_at, x_at, weight_at, bias_at, *scalars, count, _, streamed = args
        real = context.get_value_type(wide)

        def rounded(kind, value, lanes):
            return value if llama == types.none else emit_rounded(builder, kind, value, lanes)

        def step(i, lanes, past_caches):
            mean, rstd, added = (emit_spread(builder, s, lanes) for s in scalars)
            v = emit_read(builder, x.dtype, x_at, i, lanes, real)
            v = rounded(y.dtype, builder.fmul(builder.fsub(v, mean), rstd), lanes)
            if weight != types.none:
                scale = emit_read(builder, weight.dtype, weight_at, i, lanes, real)
                scale = rounded(weight.dtype, builder.fadd(scale, added), lanes)
                v = rounded(weight.dtype, builder.fmul(v, scale), lanes)
            if bias != types.none:
                shift = emit_read(builder, bias.dtype, bias_at, i, lanes, real)
                v = rounded(bias.dtype, builder.fadd(v, shift), lanes)
            emit_write(builder, y.dtype, y_at, i, v, lanes, past_caches)

        emit_loop(builder, count, real, streamed, step)
        return context.get_dummy_value()

    numbers = (wide, wide, wide, types.int64)
    return types.void(y, x, weight, bias, *numbers, llama, types.boolean), emit


def _scaled(dy, weight, weight_offset):
    # Rounded by itself, in no sum: the one column of a row has then no gradient at all.
    return dy if weight is None else dy.times(weight + weight_offset)


def _parameter_gradients(dy, x, weight, dweight, dbias, mean, rstd, weight_offset):
    xhat, g = (x - mean) * rstd, _scaled(dy, weight, weight_offset)
    dweight = None if dweight is None else dweight + dy * xhat
    return dweight, None if dbias is None else dbias + dy, g, g * xhat


def _gradients(dy, x, dsum, weight, factor, mean, rstd, g_mean, dot_mean, weight_offset):
    g = _scaled(dy, weight, weight_offset)
    v = rstd * (g - g_mean - (x - mean) * rstd * dot_mean)
    dresidual = v if dsum is None else v + dsum
    return dresidual, kept(dresidual, factor)


# With g = dy * (weight_offset + weight): dweight += dy * xhat, dbias += dy, the sums of g and of
# g * xhat; then dresidual = rstd * (g - g_mean - xhat * dot_mean) + dsum, dx that times factors.
add_gradients = sums_of(_parameter_gradients, 2)
write_gradient = loop_of(_gradients)
