"""The passes of a norm over a row. A pointer that is None leaves its term out."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import arithmetic_of, load, offset, real, reciprocal_root
from tilewise.kernels.numba._stream import (
    CHUNK,
    emit_loop,
    emit_read,
    emit_rounded,
    emit_spread,
    emit_write,
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


def _emit_kept(builder, factors, value, i, lanes, wide, factor_kind):
    """`value` times what dropout says, 0 where that is 0 whatever the value."""
    factor = emit_read(builder, factor_kind, factors, i, lanes, wide)
    zero = factor.type(0.0) if lanes == 1 else factor.type([0.0] * lanes)
    dropped = builder.fcmp_ordered("==", factor, zero)
    return builder.select(dropped, zero, builder.fmul(value, factor))


@intrinsic
def add_row(typing_context, total, x, residual, factors, count):
    """total = x * factors + residual."""
    wide = arithmetic_of(total.dtype)

    def emit(context, builder, signature, args):
        total_at, x_at, residual_at, factors_at, count = args
        real = context.get_value_type(wide)

        def step(i, lanes, past_caches):
            v = emit_read(builder, x.dtype, x_at, i, lanes, real)
            if factors != types.none:
                v = _emit_kept(builder, factors_at, v, i, lanes, real, factors.dtype)
            v = builder.fadd(v, emit_read(builder, residual.dtype, residual_at, i, lanes, real))
            emit_write(builder, total.dtype, total_at, i, v, lanes, past_caches)

        never = context.get_constant(types.boolean, False)
        emit_loop(builder, count, real, never, step)
        return context.get_dummy_value()

    return types.void(total, x, residual, factors, types.int64), emit


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


@intrinsic
def write_gradient(
    typing_context, dx, dresidual, dy, dsum, x, weight, factors, mean, rstd, g_mean, dot_mean,
    weight_offset, count, past_caches,
):  # fmt: skip
    """dresidual = rstd * (g - g_mean - xhat * dot_mean) + dsum, and dx that times factors."""
    wide = arithmetic_of(dy.dtype)

    def emit(context, builder, signature, args):
        dx_at, dresidual_at, dy_at, dsum_at, x_at, weight_at, factors_at = args[:7]
        *scalars, count, streamed = args[7:]
        real = context.get_value_type(wide)

        def step(i, lanes, past_caches):
            mean, rstd, g_mean, dot_mean, added = (emit_spread(builder, s, lanes) for s in scalars)
            g = emit_read(builder, dy.dtype, dy_at, i, lanes, real)
            if weight != types.none:
                scale = emit_read(builder, weight.dtype, weight_at, i, lanes, real)
                # With a flag of its own it is rounded by itself, as it was in the sum that makes
                # g_mean: the one column of a row has no gradient at all.
                g = builder.fmul(g, builder.fadd(scale, added), flags=("nsz",))
            xhat = builder.fsub(emit_read(builder, x.dtype, x_at, i, lanes, real), mean)
            along = builder.fmul(builder.fmul(xhat, rstd), dot_mean)
            v = builder.fmul(rstd, builder.fsub(builder.fsub(g, g_mean), along))
            if dsum != types.none:
                v = builder.fadd(v, emit_read(builder, dsum.dtype, dsum_at, i, lanes, real))
            if dresidual != types.none:
                emit_write(builder, dresidual.dtype, dresidual_at, i, v, lanes, past_caches)
            if dx != types.none:
                if factors != types.none:
                    v = _emit_kept(builder, factors_at, v, i, lanes, real, factors.dtype)
                emit_write(builder, dx.dtype, dx_at, i, v, lanes, past_caches)

        emit_loop(builder, count, real, streamed, step)
        return context.get_dummy_value()

    numbers = (wide, wide, wide, wide, wide, types.int64, types.boolean)
    return types.void(dx, dresidual, dy, dsum, x, weight, factors, *numbers), emit
