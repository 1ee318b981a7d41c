"""Loops down the rows of a tile, a vector of its columns at a time."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import (
    Lanes,
    constant,
    kept,
    lanes_of,
    load_vector,
    splat,
    store_vector,
    tanh,
    vector_of,
    where,
)
from tilewise.kernels.numba._parallel import INT64
from tilewise.kernels.numba._philox import emit_philox

NUMBER = types.int64


def _loaded(builder, p, place=0):
    return Lanes(builder, load_vector(builder, p, place))


def _full(builder, value, like):
    return Lanes(builder, splat(builder, value, vector_of(like.type.pointee)))


def _down(builder, rows, stride, body):
    """body(row, where its columns begin) for every row."""
    with cgutils.for_range(builder, rows) as loop:
        body(loop.index, builder.mul(loop.index, stride))


@intrinsic
def scale_columns(typing_context, sums, stride, rows, factor):
    """sums[rows, lanes] *= factor[lanes]."""

    def emit(context, builder, signature, args):
        sums, stride, rows, factor = args
        factor = _loaded(builder, factor)

        def scale(row, place):
            store_vector(builder, (_loaded(builder, sums, place) * factor).value, sums, place)

        _down(builder, rows, stride, scale)
        return context.get_dummy_value()

    return types.void(sums, NUMBER, NUMBER, sums), emit


@intrinsic
def cap_columns(typing_context, scores, stride, rows, scale, cap, bounded):
    """scores = cap * tanh(scale * scores), the tanh itself going to `bounded`; or, with a cap of 0,
    scores = scale * scores."""

    def emit(context, builder, signature, args):
        scores, stride, rows, scale, cap, bounded = args
        is_capped = builder.fcmp_ordered(">", cap, constant(cap.type, 0.0))
        scale, cap = (_full(builder, v, scores) for v in (scale, cap))

        def bound(row, place):
            t = tanh(_loaded(builder, scores, place) * scale)
            store_vector(builder, t.value, bounded, place)
            store_vector(builder, (cap * t).value, scores, place)

        def only_scale(row, place):
            store_vector(builder, (_loaded(builder, scores, place) * scale).value, scores, place)

        with builder.if_else(is_capped) as (capped, free):
            with capped:
                _down(builder, rows, stride, bound)
            with free:
                _down(builder, rows, stride, only_scale)
        return context.get_dummy_value()

    return types.void(scores, NUMBER, NUMBER, scale, cap, scores), emit


@intrinsic
def uncap_columns(typing_context, ds, stride, rows, bounded):
    """ds *= 1 - bounded^2: back through what `cap_columns` did; 0 stays 0."""

    def emit(context, builder, signature, args):
        ds, stride, rows, bounded = args

        def back(row, place):
            t, d = _loaded(builder, bounded, place), _loaded(builder, ds, place)
            d = where(d.equals(0.0), 0.0, d * (1.0 - t * t))
            store_vector(builder, d.value, ds, place)

        _down(builder, rows, stride, back)
        return context.get_dummy_value()

    return types.void(ds, NUMBER, NUMBER, ds), emit


@intrinsic
def add_columns(typing_context, scores, stride, more, more_stride, rows):
    """scores += more."""

    def emit(context, builder, signature, args):
        scores, stride, more, more_stride, rows = args

        def add(row, place):
            x = _loaded(builder, scores, place)
            x = x + _loaded(builder, more, builder.mul(row, more_stride))
            store_vector(builder, x.value, scores, place)

        _down(builder, rows, stride, add)
        return context.get_dummy_value()

    return types.void(scores, NUMBER, scores, NUMBER, NUMBER), emit


@intrinsic
def hide_columns(typing_context, scores, stride, marks, mark_stride, rows):
    """scores = -inf where the mark is not 0."""

    def emit(context, builder, signature, args):
        scores, stride, marks, mark_stride, rows = args

        def hide(row, place):
            mark = _loaded(builder, marks, builder.mul(row, mark_stride))
            x = where(mark.equals(0.0), _loaded(builder, scores, place), float("-inf"))
            store_vector(builder, x.value, scores, place)

        _down(builder, rows, stride, hide)
        return context.get_dummy_value()

    return types.void(scores, NUMBER, scores, NUMBER, NUMBER), emit


@intrinsic
def place_columns(typing_context, scores, stride, rows, start, left, right, slope):
    """scores -= slope * |d|, and -inf unless -left <= d <= right, with d = row + start."""

    def emit(context, builder, signature, args):
        scores, stride, rows, start, left, right, slope = args
        vector = vector_of(scores.type.pointee)
        slope = _loaded(builder, slope)
        left, right = (_full(builder, v, scores) for v in (left, right))
        distance = cgutils.alloca_once(builder, vector)
        builder.store(load_vector(builder, start), distance)

        def locate(row, place):
            d = Lanes(builder, builder.load(distance))
            x = _loaded(builder, scores, place) - slope * abs(d)
            x = where(d < -left, float("-inf"), where(d > right, float("-inf"), x))
            store_vector(builder, x.value, scores, place)
            builder.store((d + 1.0).value, distance)

        _down(builder, rows, stride, locate)
        return context.get_dummy_value()

    number = scores.dtype
    return types.void(scores, NUMBER, NUMBER, scores, number, number, scores), emit


@intrinsic
def keep_columns(typing_context, x, stride, rows, marks):
    """x = x * mark, 0 where the mark is, whatever x is."""

    def emit(context, builder, signature, args):
        x, stride, rows, marks = args

        def keep(row, place):
            value = kept(_loaded(builder, x, place), _loaded(builder, marks, place))
            store_vector(builder, value.value, x, place)

        _down(builder, rows, stride, keep)
        return context.get_dummy_value()

    return types.void(x, NUMBER, NUMBER, x), emit


@intrinsic
def mark_columns(
    typing_context, marks, stride, rows, first, counters, seed, place, threshold, scale
):
    """marks[rows, lanes] = scale where dropout keeps column first + row of the lane's row of the
    counter, else 0. `first` is a multiple of 4, and memory goes on to the next row that is."""

    def emit(context, builder, signature, args):
        marks, stride, rows, first, counters, seed, place, threshold, scale = args
        scalar = marks.type.pointee
        vector, count = vector_of(scalar), lanes_of(scalar)
        wide = ir.VectorType(INT64, count)
        pointer = builder.bitcast(counters, wide.as_pointer())
        counters = builder.load(pointer)
        counters.align = 8
        seed, place, threshold = (splat(builder, v, wide) for v in (seed, place, threshold))
        scale, none = splat(builder, scale, vector), constant(vector, 0.0)
        groups = builder.sdiv(builder.add(rows, INT64(3)), INT64(4))
        with cgutils.for_range(builder, groups) as loop:
            row = builder.mul(loop.index, INT64(4))
            group = builder.sdiv(builder.add(first, row), INT64(4))
            words = emit_philox(builder, seed, place, counters, splat(builder, group, wide))
            for i, word in enumerate(words):
                keeps = builder.icmp_unsigned(">=", word, threshold)
                at = builder.mul(builder.add(row, INT64(i)), stride)
                store_vector(builder, builder.select(keeps, scale, none), marks, at)
        return context.get_dummy_value()

    n = NUMBER
    return types.void(marks, n, n, n, counters, n, n, n, scale), emit
