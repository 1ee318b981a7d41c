"""The softmax of a tile of scores whose queries lie on the lanes and whose keys are its rows.

Sums and maxima over the keys are then sums and maxima of whole vectors. `factor` takes a score to
units of log 2, where a probability is a power of two; it does so in the one rounding of a fused
multiplication, which would be two if the queries were scaled. It comes in two parts, both above 0:
itself rounded down, and what that left out, by which all the scores would be wrong alike.
"""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import (
    DOUBLE,
    call,
    constant,
    load_vector,
    splat,
    store_vector,
    vector_of,
)
from tilewise.kernels.numba._parallel import INT32, INT64

# log2(e) to 107 bits: itself as a double, and what that leaves out
LOG2_E = Fraction(math.log2(math.e)) + Fraction(2.0355273740931033e-17)

# 2**f on [-1/2, 1/2], highest power first: interpolated at Chebyshev's points, off by 2.5e-09.
_TERMS = (
    0.000154614447248, 0.00134004281777, 0.00961805667843, 0.0555032722667, 0.240226509223,
    0.693147206703, 1,
)  # fmt: skip
_LOWEST = -126.0

_FEW = 8


@lru_cache
def scaling(scale: float, double: bool) -> tuple[float, float, tuple[float, float]]:
    """Sign, size, and what takes a score to units of log 2, in two parts of fp32 or fp64.

    Both are above 0, or a score of -inf would become NaN.
    The sign goes to the queries, so that the highest score stays the highest when scaled.
    """
    sign, scale = (math.copysign(1.0, scale), abs(scale)) if scale else (0.0, 1.0)
    exact, real = Fraction(scale) * LOG2_E, np.float64 if double else np.float32
    main = real(exact)
    if Fraction(float(main)) > exact:
        main = np.nextafter(main, real(0))
    rest = max(float(exact - Fraction(float(main))), float(np.finfo(real).tiny))
    return sign, scale, (float(main), rest)


def _emit_exp2(builder, x):
    """2**x for x up to 127: 0 below -126 (fp64: libm's), NaN for NaN."""
    vector = x.type
    if vector.element == DOUBLE:
        return call(builder, "exp2", x)
    bits = ir.VectorType(INT32, vector.count)
    lowest = constant(vector, _LOWEST)
    small = builder.fcmp_ordered("<", x, lowest)
    clamped = builder.select(small, lowest, x)
    n = call(builder, "rint", clamped)
    f = builder.fsub(clamped, n)
    p = constant(vector, _TERMS[0])
    for term in _TERMS[1:]:
        p = call(builder, "fma", p, f, constant(vector, term))
    exponent = builder.shl(builder.fptosi(n, bits), ir.Constant(bits, [23] * vector.count))
    y = builder.bitcast(builder.add(builder.bitcast(p, bits), exponent), vector)
    y = builder.select(small, constant(vector, 0), y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


def _emit_power(builder, x, factor, base):
    """2**(factor x - base)."""
    main, rest = factor
    scaled = call(builder, "fma", x, main, builder.fneg(base))
    return _emit_exp2(builder, call(builder, "fma", x, rest, scaled))


def _emit_factor(builder, factor, vector):
    return [splat(builder, part, vector) for part in cgutils.unpack_tuple(builder, factor, 2)]


def _emit_larger(builder, x, y):
    """The larger; y where x is NaN, which stays in the score and reaches the sum from there."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _plus(builder, x, y):
    """The sum of these two: by its flag it stays where it is in a tree."""
    return builder.fadd(x, y, flags=("nsz",))


def _accumulator(builder, value):
    """A vector that LLVM keeps in a register through a loop."""
    slot = cgutils.alloca_once(builder, value.type)
    builder.store(value, slot)
    return slot


@intrinsic
def softmax_columns(typing_context, scores, stride, keys, factor, highest, total, rescale):
    """Turn the scores [keys, lanes] of one vector of queries into 2**(factor (score - highest)).

    `highest` and `total` are brought up to date; what was summed before is to be multiplied by
    `rescale`. A query that has seen no key yet has -inf, 0 and 0.
    """

    def emit(context, builder, signature, args):
        scores, stride, keys, factor, highest_at, total_at, rescale_at = args
        vector = vector_of(scores.type.pointee)
        factor = _emit_factor(builder, factor, vector)
        before = load_vector(builder, highest_at)
        highest = _accumulator(builder, before)
        with cgutils.for_range(builder, keys) as loop:
            x = load_vector(builder, scores, builder.mul(loop.index, stride))
            builder.store(_emit_larger(builder, x, builder.load(highest)), highest)

        now = builder.load(highest)
        none = builder.fcmp_ordered("==", now, constant(vector, float("-inf")))
        base = builder.select(none, constant(vector, 0), now)
        base = builder.fmul(base, factor[0])
        # As rounded when it was the base of what is in the sums: not in one rounding with `base`.
        base_before = builder.fmul(before, factor[0])
        scaled = _emit_exp2(builder, builder.fsub(base_before, base))
        seen_before = builder.fmul(load_vector(builder, total_at), scaled)
        total = _accumulator(builder, constant(vector, 0))

        def power(row):
            place = builder.mul(row, stride)
            p = _emit_power(builder, load_vector(builder, scores, place), factor, base)
            store_vector(builder, p, scores, place)
            return p

        # Pairs of a few are summed, those of a tile, and those of tiles: a long sum is wrong by the
        # root of its length, and what is wrong here is wrong for all keys alike.
        few = builder.sdiv(keys, INT64(_FEW))
        with cgutils.for_range(builder, few) as loop:
            row = builder.mul(loop.index, INT64(_FEW))
            some = [power(builder.add(row, INT64(i))) for i in range(_FEW)]
            while len(some) > 1:
                some = [_plus(builder, *two) for two in zip(some[::2], some[1::2], strict=True)]
            builder.store(_plus(builder, builder.load(total), *some), total)
        summed, some = builder.mul(few, INT64(_FEW)), _accumulator(builder, constant(vector, 0))
        with cgutils.for_range(builder, builder.sub(keys, summed)) as loop:
            p = power(builder.add(summed, loop.index))
            builder.store(_plus(builder, builder.load(some), p), some)
        builder.store(_plus(builder, builder.load(total), builder.load(some)), total)

        store_vector(builder, now, highest_at)
        store_vector(builder, builder.fadd(seen_before, builder.load(total)), total_at)
        store_vector(builder, scaled, rescale_at)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, factor, scores, scores, scores), emit


@intrinsic
def softmax_gradient(typing_context, scores, dp, stride, keys, factor, highest, part, delta):
    """scores = p = part * 2**(factor score - highest) and dp = p * (dp - delta), for one vector."""

    def emit(context, builder, signature, args):
        scores, dp, stride, keys, factor, highest, part, delta = args
        factor = _emit_factor(builder, factor, vector_of(scores.type.pointee))
        base = load_vector(builder, highest)
        part, delta = load_vector(builder, part), load_vector(builder, delta)
        with cgutils.for_range(builder, keys) as loop:
            place = builder.mul(loop.index, stride)
            p = _emit_power(builder, load_vector(builder, scores, place), factor, base)
            p = builder.fmul(p, part)
            store_vector(builder, p, scores, place)
            ds = builder.fmul(p, builder.fsub(load_vector(builder, dp, place), delta))
            store_vector(builder, ds, dp, place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, scores, i, i, factor, scores, scores, scores), emit


@intrinsic
def softmax_gradient_alone(typing_context, scores, dp, stride, keys, factor, highest, part, less):
    """`softmax_gradient` where these are all the keys of the queries: delta is the sum of p * dp,
    of the very numbers that it is taken from, minus `less`."""

    def emit(context, builder, signature, args):
        scores, dp, stride, keys, factor, highest, part, less = args
        vector = vector_of(scores.type.pointee)
        factor = _emit_factor(builder, factor, vector)
        base, part = load_vector(builder, highest), load_vector(builder, part)
        dot = _accumulator(builder, constant(vector, 0))
        with cgutils.for_range(builder, keys) as loop:
            place = builder.mul(loop.index, stride)
            p = _emit_power(builder, load_vector(builder, scores, place), factor, base)
            p = builder.fmul(p, part)
            store_vector(builder, p, scores, place)
            term = builder.fmul(p, load_vector(builder, dp, place))
            builder.store(builder.fadd(builder.load(dot), term), dot)
        delta = builder.fsub(builder.load(dot), load_vector(builder, less))
        with cgutils.for_range(builder, keys) as loop:
            place = builder.mul(loop.index, stride)
            ds = builder.fsub(load_vector(builder, dp, place), delta)
            ds = builder.fmul(load_vector(builder, scores, place), ds)
            store_vector(builder, ds, dp, place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, scores, i, i, factor, scores, scores, scores), emit
