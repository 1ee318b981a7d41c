"""Products of a few rows with many that are read once, straight from where they lie: scores of
queries with keys, whose dims lie on the lanes, and sums of values.

Rows are given by their addresses. A tile has as many products as there are lanes, whose vectors of
sums are added up by a tree of shuffles. The last vector of a row ends with it and begins before
what is left over; of a row that is to meet it, what it meets twice is 0.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import (
    call,
    constant,
    lanes_of,
    load_vector,
    splat,
    store_vector,
    vector_of,
)
from tilewise.kernels.numba._matmul import HEIGHT, lanes, once
from tilewise.kernels.numba._parallel import INT8, INT32, INT64, callee
from tilewise.kernels.numba._simd import load, offset, pointer, real, store
from tilewise.kernels.numba._stream import emit_read

KEYS = np.int64(128)  # keys whose scores are made at once, a line of them
ROWS = np.int64(16)  # queries whose scores are

# Accumulators of a sum of values: half of the registers.
ACCUMULATORS = 16 if HEIGHT == 8 else 8


def _emit_folded(builder, vectors):
    """A vector of the sums of as many vectors as it has lanes."""
    width, level = len(vectors), dict(enumerate(vectors))
    half = width // 2
    while half:
        own = [j if not j & half else width + j for j in range(width)]
        other = [j ^ half if not j & half else width + (j ^ half) for j in range(width)]
        masks = [ir.Constant(ir.VectorType(INT32, width), order) for order in (own, other)]
        level = {
            i: builder.fadd(
                *(builder.shuffle_vector(x, level[i | half], mask) for mask in masks),
                flags=("nsz",),
            )
            for i, x in level.items()
            if not i & half
        }
        half //= 2
    return level[0]


def _emit_first(builder, step, size, lanes):
    """Where a vector of a row begins: the last one ends with the row."""
    at = builder.mul(step, INT64(lanes))
    last = builder.sub(size, INT64(lanes))
    return builder.select(builder.icmp_signed("<", at, last), at, last)


def _emit_ask(builder, addresses, index, kind, at):
    """Ask for element `at` of the row whose address is at `index`, which will be read soon."""
    p = builder.inttoptr(builder.load(builder.gep(addresses, [index])), kind)
    byte = INT8.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32]),
        "llvm.prefetch.p0",
    )
    place = builder.bitcast(builder.gep(p, [at]), byte)
    builder.call(function, [place, INT32(0), INT32(3), INT32(1)])


def _products(rows):
    @intrinsic
    def products(typing_context, s, s_stride, q, q_stride, keys_at, kind, vectors, dim, ahead):
        """s[rows, lanes / rows] = the queries times the next keys."""

        def emit(context, builder, signature, args):
            s, s_stride, q, q_stride, keys_at, _, vectors, dim, ahead = args
            scalar, at_kind = q.type.pointee, context.get_value_type(types.CPointer(kind))
            width, vector = lanes_of(scalar), vector_of(scalar)
            count = width // rows
            if count == 0:
                return context.get_dummy_value()
            keys = [
                builder.inttoptr(builder.load(builder.gep(keys_at, [INT64(i)])), at_kind)
                for i in range(count)
            ]
            queries = [builder.gep(q, [builder.mul(q_stride, INT64(r))]) for r in range(rows)]
            zero = constant(vector, 0)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(width)]
            for slot in sums:
                builder.store(zero, slot)
            with cgutils.for_range(builder, vectors) as loop:
                at = _emit_first(builder, loop.index, dim, width)
                for i in range(count):
                    _emit_ask(builder, keys_at, builder.add(ahead, INT64(i)), at_kind, at)
                xs = [emit_read(builder, kind, p, at, width, scalar) for p in keys]
                for r, query in enumerate(queries):
                    y = load_vector(builder, query, builder.mul(loop.index, INT64(width)))
                    for i, x in enumerate(xs):
                        slot = sums[r * count + i]
                        builder.store(call(builder, "fma", y, x, builder.load(slot)), slot)
            folded = _emit_folded(builder, [builder.load(slot) for slot in sums])
            for r in range(rows):
                order = ir.Constant(
                    ir.VectorType(INT32, count), list(range(r * count, (r + 1) * count))
                )
                part = builder.shuffle_vector(folded, folded, order)
                place = builder.gep(s, [builder.mul(s_stride, INT64(r))])
                stored = builder.store(part, builder.bitcast(place, part.type.as_pointer()))
                stored.align = 4
            return context.get_dummy_value()

        kind, i = types.unliteral(kind), types.int64
        return types.void(s, i, q, i, keys_at, kind, i, i, i), emit

    return products


_one_row, _two_rows, _four_rows = (_products(rows) for rows in (1, 2, 4))


def _weighted(rows, vectors):
    @intrinsic
    def weighted(
        typing_context,
        sums,
        sums_stride,
        p,
        p_stride,
        rescale,
        values_at,
        kind,
        keys,
        start,
        dim,
        ahead,
    ):
        """sums[rows, vectors] = rescale * sums + p values, of the vectors `start` and on."""

        def emit(context, builder, signature, args):
            sums, sums_stride, p, p_stride, rescale, values_at, _, keys, start, dim, ahead = args
            scalar, at_kind = sums.type.pointee, context.get_value_type(types.CPointer(kind))
            width, vector = lanes_of(scalar), vector_of(scalar)
            places = [
                _emit_first(builder, builder.add(start, INT64(j)), dim, width)
                for j in range(vectors)
            ]
            zero = constant(vector, 0)
            slots = [[cgutils.alloca_once(builder, vector) for _ in places] for _ in range(rows)]
            for row in slots:
                for slot in row:
                    builder.store(zero, slot)
            with cgutils.for_range(builder, keys) as loop:
                address = builder.load(builder.gep(values_at, [loop.index]))
                value = builder.inttoptr(address, at_kind)
                for at in places:
                    _emit_ask(builder, values_at, builder.add(ahead, loop.index), at_kind, at)
                xs = [emit_read(builder, kind, value, at, width, scalar) for at in places]
                for r, row in enumerate(slots):
                    place = builder.add(builder.mul(p_stride, INT64(r)), loop.index)
                    weight = splat(builder, builder.load(builder.gep(p, [place])), vector)
                    for x, slot in zip(xs, row, strict=True):
                        builder.store(call(builder, "fma", weight, x, builder.load(slot)), slot)
            for r, row in enumerate(slots):
                factor = builder.load(builder.gep(rescale, [INT64(r)]))
                factor = splat(builder, factor, vector)
                for j, slot in enumerate(row):
                    at = builder.mul(builder.add(start, INT64(j)), INT64(width))
                    at = builder.add(at, builder.mul(sums_stride, INT64(r)))
                    old = load_vector(builder, sums, at)
                    new = call(builder, "fma", old, factor, builder.load(slot))
                    store_vector(builder, new, sums, at)
            return context.get_dummy_value()

        kind, i = types.unliteral(kind), types.int64
        return types.void(sums, i, p, i, rescale, values_at, kind, i, i, i, i), emit

    return weighted


_MOST = {rows: min(ACCUMULATORS // rows, 8) for rows in (1, 2, 4)}
_many_by_one, _many_by_two, _many_by_four = (_weighted(rows, n) for rows, n in _MOST.items())
_one_by_one, _one_by_two, _one_by_four = (_weighted(rows, 1) for rows in _MOST)
MANY_BY_ONE, MANY_BY_TWO, MANY_BY_FOUR = (np.int64(n) for n in _MOST.values())


@callee
def multiply_keys(s, q, q_stride, keys_at, kind, rows, step, keys, dim, near):
    """Scores of `rows` queries, a multiple of `step`, with these keys, and with what follows them
    up to a multiple of the lanes, while those `near` further on are asked for."""
    once()
    width = lanes(s)
    if dim < width:
        for j in range(keys):
            x = pointer(load(keys_at, j), kind)
            for r in range(rows):
                total = real(s, 0)
                for d in range(dim):
                    total += load(q, r * q_stride + d) * load(x, d)
                store(s, r * KEYS + j, total)
        return
    vectors, count = (dim + width - 1) // width, width // step
    for group in range((keys + count - 1) // count):
        first = group * count
        some = offset(keys_at, first)
        for part in range(rows // step):
            r = part * step
            to, queries = offset(s, r * KEYS + first), offset(q, r * q_stride)
            next = near if part == 0 else 0
            if step == 1:
                _one_row(to, KEYS, queries, q_stride, some, kind, vectors, dim, next)
            elif step == 2:
                _two_rows(to, KEYS, queries, q_stride, some, kind, vectors, dim, next)
            else:
                _four_rows(to, KEYS, queries, q_stride, some, kind, vectors, dim, next)


@callee
def weigh_values(sums, stride, p, rescale, ones, values_at, kind, rows, step, keys, dim, near):
    """sums = rescale * sums + p values, for `rows` queries, a multiple of `step`: of as many keys
    at a time as stay in the L1 cache, while the next as many are asked for."""
    once()
    width = lanes(sums)
    if dim < width:
        for r in range(rows):
            for d in range(dim):
                total = real(sums, 0)
                for j in range(keys):
                    total += load(p, r * KEYS + j) * load(pointer(load(values_at, j), kind), d)
                place = r * stride + d
                store(sums, place, load(sums, place) * load(rescale, r) + total)
        return
    vectors = (dim + width - 1) // width
    most = MANY_BY_ONE if step == 1 else MANY_BY_TWO if step == 2 else MANY_BY_FOUR
    for first in range(0, keys, near):
        count, values = min(near, keys - first), offset(values_at, first)
        for part in range(rows // step):
            r = part * step
            to, ps = offset(sums, r * stride), offset(p, r * KEYS + first)
            factors = offset(rescale, r) if first == 0 else ones
            next = near if part == 0 else 0
            for turn in range(vectors // most + vectors % most):
                many = turn < vectors // most
                start = turn * most if many else vectors // most * most + turn - vectors // most
                if step == 1:
                    if many:
                        _many_by_one(
                            to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                        )
                    else:
                        _one_by_one(
                            to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                        )
                elif step == 2:
                    if many:
                        _many_by_two(
                            to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                        )
                    else:
                        _one_by_two(
                            to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                        )
                elif many:
                    _many_by_four(
                        to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                    )
                else:
                    _one_by_four(
                        to, stride, ps, KEYS, factors, values, kind, count, start, dim, next
                    )


@callee
def element(sums, d, dim):
    """Element `d` of a row whose last vector ends with it."""
    width = lanes(sums)
    whole = dim // width * width
    return load(sums, d if d < whole or dim < width else whole + d - (dim - width))
