"""The softmax of a tile of scores whose queries lie on the lanes and whose keys are its rows.

Sums and maxima over the keys are then sums and maxima of whole vectors. `factor` takes a score to
units of log 2, where a probability is a power of two. It comes in two parts, both above 0: itself
rounded down, and what that left out, by which all the scores would be wrong alike.

Powers are taken above the highest score, in a whole number and what is left: the whole numbers are
taken off in one rounding of a product near 0, to 2**-25. In one rounding with the highest itself
differences of 8 and more came out to 2**-21, and probabilities were off by 2.6e-7 of themselves
(root of the mean square, exact scores of 256 keys, dim 64), now by 0.8e-7, PyTorch's by 0.9e-7
(tests/properties/test_attention.py has the case). Above a whole number, the nearest to the highest,
they would be as exact, but not a sum of few: where one key has all, the logarithm of the sum would
be off by the rounding of a number near 1.
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
    has,
    load_vector,
    splat,
    store_vector,
    vector_of,
)
from tilewise.kernels.numba._parallel import INT32, INT64

# log2(e) to 107 bits: itself as a double, and what that leaves out
LOG2_E = Fraction(math.log2(math.e)) + Fraction(2.0355273740931033e-17)

# 2**f on [-1/2, 1/2] in fp32 (in fp64 it is libm's), highest power first: interpolated at
# Chebyshev's points, off by 2.5e-09.
_TERMS = (
    0.000154614447248, 0.00134004281777, 0.00961805667843, 0.0555032722667, 0.240226509223,
    0.693147206703, 1,
)  # fmt: skip
_LOWEST = -125, -1021  # of fp32 and of fp64: times what is above 1/sqrt(2) no subnormal

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


def _emit_exp2(builder, n, f):
    """2**(n + f) of a whole n up to 127 and an f between -1/2 and 1/2: 0 where n is below `_LOWEST`
    whatever f is, and NaN where it is NaN."""
    vector, double = f.type, f.type.element == DOUBLE
    if double:
        p = call(builder, "exp2", f)
    else:
        p = constant(vector, _TERMS[0])
        for term in _TERMS[1:]:
            p = call(builder, "fma", p, f, constant(vector, term))
    zero = constant(vector, 0)
    if has("avx512f"):
        counts = builder.fcmp_unordered(">=", n, constant(vector, _LOWEST[double]))
        return _emit_scaled(builder, p, n, counts)
    bits = ir.VectorType(INT64 if double else INT32, vector.count)
    place = ir.Constant(bits, [52 if double else 23] * vector.count)
    counts = builder.fcmp_ordered(">=", n, constant(vector, _LOWEST[double]))
    exponent = builder.shl(builder.fptosi(builder.select(counts, n, zero), bits), place)
    scaled = builder.bitcast(builder.add(builder.bitcast(p, bits), exponent), vector)
    scaled = builder.select(counts, scaled, zero)
    return builder.select(builder.fcmp_unordered("uno", n, n), n, scaled)


def _emit_scaled(builder, p, n, counts):
    """p * 2**n where it counts, else 0: AVX-512's one instruction for the six above."""
    vector = p.type
    mask, rounding = ir.IntType(vector.count), INT32(4)  # as the CPU is set
    kind = ir.FunctionType(vector, [vector, vector, vector, mask, INT32])
    name = f"llvm.x86.avx512.mask.scalef.{'pd' if vector.element == DOUBLE else 'ps'}.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    counts = builder.bitcast(counts, mask)
    return builder.call(function, [p, n, constant(vector, 0), counts, rounding])


def _emit_rescale(builder, less):
    n = call(builder, "rint", less)
    return _emit_exp2(builder, n, builder.fsub(less, n))


def _emit_highest(builder, score, factor):
    """The highest score in units of log 2, with a rounding of its own, not one with what is taken
    from it or it from: all that is summed above it is above the very same number."""
    return builder.fmul(score, factor[0], flags=("nsz",))


def _emit_base(builder, highest):
    """What the powers of a row are taken above: a score in units of log 2; the whole number next to
    it, and what is left."""
    whole = call(builder, "rint", highest)
    return highest, whole, builder.fsub(highest, whole)


def _emit_power(builder, x, factor, base):
    """2**(factor x - base), 0 where that is nothing, NaN for NaN."""
    main, rest = factor
    highest, whole, left = base
    n = call(builder, "rint", call(builder, "fma", x, main, builder.fneg(highest)))
    f = call(builder, "fma", x, main, builder.fneg(builder.fadd(n, whole)))
    return _emit_exp2(builder, n, call(builder, "fma", x, rest, builder.fsub(f, left)))


def _emit_part(builder, p, sums):
    """p over the sum of its row, whose reciprocal comes first, rounded all but once: with the
    reciprocal alone a whole row would be wrong alike, and one key have no probability of 1."""
    part, total = sums
    quotient = builder.fmul(p, part)
    left = call(builder, "fma", builder.fneg(quotient), total, p)
    return call(builder, "fma", left, part, quotient)


def _emit_factor(builder, factor, vector):
    return [splat(builder, part, vector) for part in cgutils.unpack_tuple(builder, factor, 2)]


def _loaded_pair(builder, pointers):
    return [load_vector(builder, p) for p in cgutils.unpack_tuple(builder, pointers, 2)]


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
        base = _emit_highest(builder, builder.select(none, constant(vector, 0), now), factor)
        base_before = _emit_highest(builder, before, factor)
        scaled = _emit_rescale(builder, builder.fsub(base_before, base))
        base = _emit_base(builder, base)
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
def softmax_gradient(typing_context, scores, dp, stride, keys, factor, base, sums, delta):
    """scores = p = 2**(factor score - base) / sum and dp = p * (dp - delta), for one vector."""

    def emit(context, builder, signature, args):
        scores, dp, stride, keys, factor, base, sums, delta = args
        factor = _emit_factor(builder, factor, vector_of(scores.type.pointee))
        base = _emit_base(builder, load_vector(builder, base))
        delta = load_vector(builder, delta)
        sums = _loaded_pair(builder, sums)
        with cgutils.for_range(builder, keys) as loop:
            place = builder.mul(loop.index, stride)
            p = _emit_power(builder, load_vector(builder, scores, place), factor, base)
            p = _emit_part(builder, p, sums)
            store_vector(builder, p, scores, place)
            ds = builder.fmul(p, builder.fsub(load_vector(builder, dp, place), delta))
            store_vector(builder, ds, dp, place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, scores, i, i, factor, scores, sums, scores), emit


@intrinsic
def softmax_gradient_alone(typing_context, scores, dp, stride, keys, factor, base, sums, less):
    """`softmax_gradient` where these are all the keys of the queries: delta is the sum of p * dp,
    of the very numbers that it is taken from, minus `less`."""

    def emit(context, builder, signature, args):
        scores, dp, stride, keys, factor, base, sums, less = args
        vector = vector_of(scores.type.pointee)
        factor = _emit_factor(builder, factor, vector)
        base = _emit_base(builder, load_vector(builder, base))
        sums = _loaded_pair(builder, sums)
        dot = _accumulator(builder, constant(vector, 0))
        with cgutils.for_range(builder, keys) as loop:
            place = builder.mul(loop.index, stride)
            p = _emit_power(builder, load_vector(builder, scores, place), factor, base)
            p = _emit_part(builder, p, sums)
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
    return types.void(scores, scores, i, i, factor, scores, sums, scores), emit
