"""Loops over a row in LLVM's vectors, whatever the kinds, and stores past the caches.

LLVM's own vectoriser takes four lanes where a loop ends in 16-bit floats; and a store that does not
first read the line it fills is 1.5 to 1.8 x as fast where the output is larger than the caches (one
thread of an AMD Zen 5, 4096 x 1024 in fp32, 2026-11). It has to be the loop that computes: gelu in
one loop took 0.8 ms there, and 1.2 into scratch that was then copied past the caches. Asking ahead
for the next row does not help: with prefetches norms took 0 to 40 % longer, from memory, whatever
the cache asked for; and with the next row's sum in the loop that writes this one, norms took from
8 % less to 9 % more, in and out of the caches.
"""

import math
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from tilewise.kernels.numba import _sixteen
from tilewise.kernels.numba._lanes import (
    DOUBLE,
    FLOAT,
    Lanes,
    constant,
    lanes_of,
    larger,
    splat,
    vector_of,
    wider,
)
from tilewise.kernels.numba._parallel import INT32, INT64
from tilewise.kernels.numba._simd import arithmetic_of

CHUNK = np.int64(1024)  # elements of scratch: two such, and two inputs as long, stay in L1
LINE = 64  # bytes

# Below this an output is likely to be read again from the caches, and worth keeping there.
STREAMED_BYTES = 1 << 23


def streamed(*outs: Tensor) -> bool:
    """Whether to write these rows past the caches: large, each beginning on a cache line."""
    for out in outs:
        if out.nbytes < STREAMED_BYTES or out.data_ptr() % LINE:
            return False
        if any(step * out.itemsize % LINE for step in out.stride()[:-1]):
            return False
    return True


def emit_spread(builder, value, lanes):
    """A scalar in every lane."""
    return value if lanes == 1 else splat(builder, value, ir.VectorType(value.type, lanes))


def emit_read(builder, kind, p, i, lanes, wide):
    """Elements `i` and on of `p`, of the Numba type `kind`, as `wide`, fp32 or fp64."""
    p = builder.gep(p, [i])
    if lanes > 1:
        p = builder.bitcast(p, ir.VectorType(p.type.pointee, lanes).as_pointer())
    value = builder.load(p)
    value.align = kind.bitwidth // 8
    if kind in _sixteen.KINDS:
        value = _sixteen.widen(builder, kind, value)
    return value if value.type == wider(wide, lanes) else builder.fpext(value, wider(wide, lanes))


def emit_rounded(builder, kind, value, lanes):
    """`value` as `kind` would hold it."""
    if kind not in _sixteen.KINDS:
        return value
    return _sixteen.widen(builder, kind, _sixteen.narrow(builder, kind, value))


def emit_write(builder, kind, p, i, value, lanes, past_caches):
    """Round to `kind` and write to elements `i` and on of `p`."""
    if kind in _sixteen.KINDS:
        value = _sixteen.narrow(builder, kind, value)
    elif kind == types.float32 and value.type == wider(DOUBLE, lanes):
        value = builder.fptrunc(value, wider(FLOAT, lanes))
    stored = builder.store(value, builder.bitcast(builder.gep(p, [i]), value.type.as_pointer()))
    stored.align = kind.bitwidth // 8 * (lanes if past_caches else 1)
    if past_caches and lanes > 1:
        stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))


@contextmanager
def _one_by_one(builder, start, end):
    """A loop that LLVM leaves as it is. What it makes of others are two, of which the addresses
    decide which runs: the bits would be theirs too."""
    with cgutils.for_range_slice(builder, start, end, INT64(1)) as (i, _):
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
        yield i


def emit_loop(builder, count, wide, streamed, step):
    """step(i, lanes, past_caches) over `count` elements: in vectors, the rest one by one."""
    lanes = lanes_of(wide)
    whole = builder.sdiv(count, INT64(lanes))
    with builder.if_else(streamed) as branches:
        for branch, past_caches in zip(branches, (True, False), strict=True):
            with branch, cgutils.for_range(builder, whole) as loop:
                step(builder.mul(loop.index, INT64(lanes)), lanes, past_caches)
    done = builder.mul(whole, INT64(lanes))
    with _one_by_one(builder, done, count) as i:
        step(i, 1, False)


def scratch_of(count):
    """Memory for `count` of the floats that arithmetic on the kind of `p` is done in."""

    @intrinsic
    def scratch(typing_context, p):
        wide = arithmetic_of(p.dtype)

        def emit(context, builder, signature, args):
            size = ir.ArrayType(context.get_value_type(wide), int(count))
            slot = cgutils.alloca_once(builder, size)
            slot.align = LINE
            return builder.bitcast(slot, size.element.as_pointer())

        return types.CPointer(wide)(p), emit

    return scratch


scratch = scratch_of(CHUNK)  # a function's own


def _evaluation(builder, kinds, args, real, compute):
    """What computes at element `i` and on, writes the outputs and returns all it has computed."""
    outs, ins, _ = kinds
    outs_at, ins_at, numbers_at = (
        cgutils.unpack_tuple(builder, given, len(kind))
        for given, kind in zip(args, kinds, strict=False)
    )

    def evaluate(i, lanes, goes_past):
        given = [
            Lanes(builder, emit_read(builder, p.dtype, at, i, lanes, real))
            if p != types.none else None
            for p, at in zip(ins, ins_at, strict=True)
        ]  # fmt: skip
        given += [Lanes(builder, emit_spread(builder, n, lanes)) for n in numbers_at]
        values = compute(*given)
        for n, (p, at) in enumerate(zip(outs, outs_at, strict=True)):
            if p != types.none:
                emit_write(builder, p.dtype, at, i, values[n].value, lanes, goes_past(n))
        return values

    return evaluate


def loop_of(compute, kept=0):
    """A loop over elements: outs = compute(*ins, *numbers).

    `compute` takes and returns `Lanes`, and None for an input that is None; an output that is None
    is left out. The last `kept` outputs stay in the caches, whatever is said of the others; after
    the last that do not, `finish_writes`.
    """

    @intrinsic
    def loop(typing_context, outs, ins, numbers, count, past_caches):
        wide = arithmetic_of(ins[0].dtype)

        def emit(context, builder, signature, args):
            real = context.get_value_type(wide)
            evaluate = _evaluation(builder, (outs, ins, numbers), args, real, compute)

            def step(i, lanes, past_caches):
                evaluate(i, lanes, lambda n: past_caches and n < len(outs) - kept)

            emit_loop(builder, args[3], real, args[4], step)
            return context.get_dummy_value()

        return types.void(outs, ins, numbers, types.int64, types.boolean), emit

    return loop


write = loop_of(lambda x, *factor: (x * factor[0] if factor else x,))


# --- Loops that end in a number.

_AT_ONCE = 4  # accumulators, a power of two, so that they need not wait for each other


def _emit_fold(builder, count, real, combine, neutral, terms, step):
    """Combine the `terms` that `step(i, lanes)` gives: vectors in turn, then what is left over."""
    lanes = lanes_of(real)

    def slots(t):
        return [cgutils.alloca_once_value(builder, constant(t, neutral)) for _ in range(terms)]

    def add(places, i, lanes):
        for place, term in zip(places, step(i, lanes), strict=True):
            known = Lanes(builder, builder.load(place))
            builder.store(combine(term, known).value, place)

    vectors, last = [slots(vector_of(real)) for _ in range(_AT_ONCE)], slots(real)
    stride = INT64(lanes * _AT_ONCE)
    groups = builder.sdiv(count, stride)
    with cgutils.for_range(builder, groups) as loop:
        for n, places in enumerate(vectors):
            add(places, builder.add(builder.mul(loop.index, stride), INT64(n * lanes)), lanes)
    done = builder.mul(groups, stride)
    singles = builder.sdiv(builder.sub(count, done), INT64(lanes))
    with cgutils.for_range(builder, singles) as loop:
        add(vectors[0], builder.add(done, builder.mul(loop.index, INT64(lanes))), lanes)
    done = builder.add(done, builder.mul(singles, INT64(lanes)))
    with _one_by_one(builder, done, count) as i:
        add(last, i, 1)

    results = []
    for k in range(terms):
        values = [Lanes(builder, builder.load(places[k])) for places in vectors]
        while len(values) > 1:
            values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
        rest = Lanes(builder, builder.load(last[k]))
        results.append(combine(values[0].halved(combine), rest).value)
    return results


def sums_of(compute, sums):
    """The last of outs, *terms = compute(*ins, *numbers), each summed over the elements.

    As `loop_of`, of which all outputs stay in the caches; returns a tuple.
    """

    @intrinsic
    def loop(typing_context, outs, ins, numbers, count):
        wide = arithmetic_of(ins[0].dtype)

        def emit(context, builder, signature, args):
            real = context.get_value_type(wide)
            evaluate = _evaluation(builder, (outs, ins, numbers), args, real, compute)

            def step(i, lanes):
                values = evaluate(i, lanes, lambda n: False)
                return values[len(outs) :]

            found = _emit_fold(builder, args[3], real, lambda x, y: x + y, 0.0, sums, step)
            return cgutils.pack_array(builder, found)

        return types.UniTuple(wide, sums)(outs, ins, numbers, types.int64), emit

    return loop


@intrinsic
def highest(typing_context, x, factor, count):
    """The largest of x * factor, -inf of none, in a third of the time of `maximum`: it passes over
    NaN."""
    wide = arithmetic_of(x.dtype)

    def emit(context, builder, signature, args):
        x_at, factor, count = args
        real = context.get_value_type(wide)

        def step(i, lanes):
            v = Lanes(builder, emit_read(builder, x.dtype, x_at, i, lanes, real))
            return (v * Lanes(builder, emit_spread(builder, factor, lanes)),)

        (top,) = _emit_fold(builder, count, real, larger, -math.inf, 1, step)
        return top

    return wide(x, wide, types.int64), emit


@intrinsic
def finish_writes(typing_context):
    """What was written past the caches is seen by other threads from here on."""

    def emit(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit
