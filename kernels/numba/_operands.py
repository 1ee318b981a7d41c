"""What the products of attention are made of: fp32 (or fp64) numbers, or pairs of bf16.

A pair is a word of two bf16 that are next to each other along the depth of a product, of which the
CPU adds two products in one instruction: `multiply` takes tiles of words like tiles of numbers,
half as deep. Along a row pairs lie in memory as they are, down the rows of a tile they are made.

There are words for vectors and words for AMX. Those are multiplied 16 by 16, so that their depth is
padded with zeros, and what is multiplied from the left has its depth along its rows.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from tilewise.kernels.numba import _sixteen
from tilewise.kernels.numba._amx import SIDE, is_tiled
from tilewise.kernels.numba._lanes import LANES, constant, has, load_vector
from tilewise.kernels.numba._matmul import UNIT, once, transpose
from tilewise.kernels.numba._parallel import INT32, INT64, callee
from tilewise.kernels.numba._simd import load, offset, pointer, real, store
from tilewise.kernels.numba._tiles import FLAG, NONE, padded, read_tile, rounded

PAIR, TILED_PAIR = np.int32(0), np.uint32(0)  # the kinds of a word
NUMBER = np.float32(0)
MULTIPLIES_PAIRS = has("avx512bf16") and LANES == 16


@intrinsic
def as_kind(typing_context, p, kind):
    """The memory at `p` as elements of this kind, or of that of another pointer."""
    kind = types.unliteral(kind)
    to = kind if isinstance(kind, types.CPointer) else types.CPointer(kind)

    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(to))

    return to(p, kind), emit


def _holds_pairs(p):
    return p.dtype == types.int32 or is_tiled(p)


@intrinsic
def per_word(typing_context, p):
    """How many numbers an element of the tile `p` holds: 2 of a pair, else 1."""
    count = 2 if _holds_pairs(p) else 1
    return types.int64(p), lambda context, builder, signature, args: INT64(count)


@intrinsic
def _per_depth(typing_context, p):
    """Of so many elements of the tile `p` a product is a multiple deep."""
    count = SIDE if is_tiled(p) else 1
    return types.int64(p), lambda context, builder, signature, args: INT64(count)


@callee
def depth_of(tile, count):
    """How deep a product of so many numbers is, in elements of the tile."""
    per, step = per_word(tile), _per_depth(tile)
    return ((count + per - 1) // per + step - 1) // step * step


@callee
def clear_below(tile, stride, rows, cols):
    """Zeros where a tile [rows, cols] is deeper for a product than it has numbers."""
    per = per_word(tile)
    for i in range((rows + per - 1) // per, depth_of(tile, rows)):
        for j in range(cols):
            store(offset(tile, i * stride), j, PAIR)


@callee
def _stand(to, to_stride, tile, stride, depth, cols):
    once()
    to, tile = as_kind(to, NUMBER), as_kind(tile, NUMBER)
    transpose(to, to_stride, tile, stride, depth, cols)


def standing(to, to_stride, tile, stride, depth, cols):
    """A tile [depth, cols], both whole vectors, for a product that has it transposed on the left:
    where it lies, and how far its rows, and its columns, are apart. Words for AMX are copied."""


@overload(standing, inline="always")
def _standing(to, to_stride, tile, stride, depth, cols):
    if is_tiled(tile):

        def turned(to, to_stride, tile, stride, depth, cols):
            _stand(to, to_stride, tile, stride, depth, cols)
            return to, to_stride, UNIT

        return turned
    return lambda to, to_stride, tile, stride, depth, cols: (tile, UNIT, stride)


def widest(dim: int) -> int:
    """Room for a row of a tile of either kind."""
    return 2 * rounded((dim + 1) // 2)


room = callee(lambda dim: 2 * padded((dim + 1) // 2))


@callee
def width_of(tile, dim):
    """Numbers in a row of a tile, so many that their words are whole vectors."""
    return padded((dim + per_word(tile) - 1) // per_word(tile)) * per_word(tile)


@intrinsic
def either(typing_context, tile, pairs, numbers):
    """The second, if the tile holds pairs, else the third."""
    chosen = 1 if _holds_pairs(tile) else 2
    kind = (tile, pairs, numbers)[chosen]
    return kind(tile, pairs, numbers), lambda _, builder, __, args: args[chosen]


# --- Rows of a tensor, in pairs of rows.


@intrinsic
def _pair_of(typing_context, first, second):
    """The word of two numbers that are bf16."""

    def emit(context, builder, signature, args):
        low, high = (builder.bitcast(x, INT32) for x in args)
        return builder.or_(builder.lshr(low, INT32(16)), builder.and_(high, INT32(-65536)))

    return types.int32(first, second), emit


@callee
def _read_pairs(to, width, source, stride, rows, cols, factor, seen_at, seen_step):
    once()
    none = real(factor, 0)
    clear_below(to, width, rows, width)
    for i in range((rows + 1) // 2):
        x, y = offset(source, 2 * i * stride), offset(to, i * width)
        there = 2 * i + 1 < rows
        z = offset(source, (2 * i + 1) * stride if there else 2 * i * stride)
        one, two = factor, factor if there else none
        if seen_at:
            flags = pointer(seen_at, FLAG)
            one = one if load(flags, 2 * i * seen_step) else none
            two = two if there and load(flags, (2 * i + 1) * seen_step) else none
        if one != none and two != none:
            for j in range(cols):
                store(y, j, _pair_of(load(x, j) * one, load(z, j) * two))
        else:  # what is hidden may be NaN
            for j in range(cols):
                a = load(x, j) * one if one != none else none
                b = load(z, j) * two if two != none else none
                store(y, j, _pair_of(a, b))
        for j in range(width - cols):
            store(y, cols + j, PAIR)


def read_deep(to, width, source, stride, rows, cols, factor, seen_at, seen_step):
    """A tile to be multiplied along its rows: factor * source[rows, cols], as they are or in words
    [rows / 2, width]; zeros as in `read_tile`."""


@overload(read_deep, inline="always")
def _read_deep(to, width, source, stride, rows, cols, factor, seen_at, seen_step):
    if _holds_pairs(to):
        return lambda to, width, source, stride, rows, cols, factor, seen_at, seen_step: (
            _read_pairs(to, width, source, stride, rows, cols, factor, seen_at, seen_step)
        )
    return lambda to, width, source, stride, rows, cols, factor, seen_at, seen_step: read_tile(
        to, width, source, stride, rows, cols, factor, seen_at, seen_step
    )


def pair_lines(to, lines, width, rows, cols):
    """Words [rows / 2, width] of the bf16 [rows, width], if `to` holds pairs."""


@overload(pair_lines, inline="always")
def _pair_lines(to, lines, width, rows, cols):
    if _holds_pairs(to):
        return lambda to, lines, width, rows, cols: _read_pairs(
            to, width, lines, width, rows, cols, real(lines, 1), NONE, NONE
        )
    return lambda to, lines, width, rows, cols: None


# --- Numbers of a tile that were computed, rounded to bf16.


def _words(builder, low, high):
    """Vectors of fp32 as one of words."""
    vector = ir.VectorType(INT32, low.type.count)
    bits = [builder.zext(_sixteen.narrow(builder, types.uint16, x), vector) for x in (low, high)]
    return builder.or_(bits[0], builder.shl(bits[1], constant(vector, 16)))


def _store_words(builder, value, p, place):
    p = builder.bitcast(builder.gep(p, [place]), value.type.as_pointer())
    builder.store(value, p).align = 2


@intrinsic
def pair_rows(typing_context, to, numbers, stride, rows):
    """Words [rows / 2, lanes] of the numbers [rows, lanes], if `to` holds pairs; both have rows so
    far apart."""
    if not _holds_pairs(to):
        return types.void(to, numbers, stride, rows), (
            lambda context, builder, signature, args: context.get_dummy_value()
        )

    def emit(context, builder, signature, args):
        to, numbers, stride, rows = args
        with cgutils.for_range(builder, builder.sdiv(rows, INT64(2))) as loop:
            place = builder.mul(builder.mul(loop.index, INT64(2)), stride)
            low = load_vector(builder, numbers, place)
            high = load_vector(builder, numbers, builder.add(place, stride))
            words = _words(builder, low, high)
            _store_words(builder, words, to, builder.mul(loop.index, stride))
        with builder.if_then(builder.trunc(rows, ir.IntType(1))):
            last = builder.sub(rows, INT64(1))
            low = load_vector(builder, numbers, builder.mul(last, stride))
            words = _words(builder, low, constant(low.type, 0.0))
            _store_words(builder, words, to, builder.mul(builder.sdiv(rows, INT64(2)), stride))
        return context.get_dummy_value()

    return types.void(to, numbers, types.int64, types.int64), emit


@intrinsic
def round_rows(typing_context, to, numbers, stride, rows):
    """Bf16 [rows, lanes] of the numbers [rows, lanes], if `to` holds pairs; rows so far apart."""
    if not _holds_pairs(to):
        return types.void(to, numbers, stride, rows), (
            lambda context, builder, signature, args: context.get_dummy_value()
        )

    def emit(context, builder, signature, args):
        to, numbers, stride, rows = args
        to = builder.bitcast(to, ir.IntType(16).as_pointer())
        with cgutils.for_range(builder, rows) as loop:
            place = builder.mul(loop.index, stride)
            x = load_vector(builder, numbers, place)
            _store_words(builder, _sixteen.narrow(builder, types.uint16, x), to, place)
        return context.get_dummy_value()

    return types.void(to, numbers, types.int64, types.int64), emit
