"""Loops over a row in LLVM's vectors, whatever the kinds, and stores past the caches.

LLVM's own vectoriser takes four lanes where a loop ends in 16-bit floats; and a store that does not
first read the line it fills is 1.5 to 1.8 x as fast where the output is larger than the caches (one
thread of an AMD Zen 5, 4096 x 1024 in fp32, 2026-11). Asking ahead for the next row does not help:
with prefetches norms took 0 to 40 % longer there, from memory, whatever the cache asked for.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from tilewise.kernels.numba._matmul import lanes_of, splat
from tilewise.kernels.numba._parallel import INT32, INT64
from tilewise.kernels.numba._simd import BRAIN, DOUBLE, FLOAT, HALF, arithmetic_of, load, store

CHUNK = np.int64(1024)  # elements of scratch: two such, and two inputs as long, stay in L1
LINE = 64  # bytes

# Below this an output is likely to be read again from the caches, and worth keeping there.
STREAMED_BYTES = 1 << 23

_HALVES = {types.int16: HALF, types.uint16: BRAIN}


def streamed(*outs: Tensor) -> bool:
    """Whether to write these rows past the caches: large, each beginning on a cache line."""
    return all(
        out.nbytes >= STREAMED_BYTES
        and out.data_ptr() % LINE == 0
        and out.shape[-1] * out.itemsize % LINE == 0
        for out in outs
    )


def _wider(t, lanes):
    return t if lanes == 1 else ir.VectorType(t, lanes)


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
    if kind == types.uint16:
        bits = _wider(INT32, lanes)
        sixteen = ir.Constant(INT32, 16) if lanes == 1 else ir.Constant(bits, [16] * lanes)
        value = builder.bitcast(
            builder.shl(builder.zext(value, bits), sixteen), _wider(FLOAT, lanes)
        )
    elif kind == types.int16:
        value = builder.bitcast(value, _wider(HALF, lanes))
    return value if value.type == _wider(wide, lanes) else builder.fpext(value, _wider(wide, lanes))


def emit_rounded(builder, kind, value, lanes):
    """`value` as `kind` would hold it."""
    if kind not in _HALVES:
        return value
    return builder.fpext(builder.fptrunc(value, _wider(_HALVES[kind], lanes)), value.type)


def emit_write(builder, kind, p, i, value, lanes, past_caches):
    """Round to `kind` and write to elements `i` and on of `p`."""
    if kind in _HALVES:
        value = builder.fptrunc(value, _wider(_HALVES[kind], lanes))
        value = builder.bitcast(value, _wider(ir.IntType(16), lanes))
    elif kind == types.float32 and value.type == _wider(DOUBLE, lanes):
        value = builder.fptrunc(value, _wider(FLOAT, lanes))
    stored = builder.store(value, builder.bitcast(builder.gep(p, [i]), value.type.as_pointer()))
    stored.align = kind.bitwidth // 8 * (lanes if past_caches else 1)
    if past_caches and lanes > 1:
        stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))


def emit_loop(builder, count, wide, streamed, step):
    """step(i, lanes, past_caches) over `count` elements: in vectors, the rest one by one."""
    lanes = lanes_of(wide)
    whole = builder.sdiv(count, INT64(lanes))
    with builder.if_else(streamed) as branches:
        for branch, past_caches in zip(branches, (True, False), strict=True):
            with branch, cgutils.for_range(builder, whole) as loop:
                step(builder.mul(loop.index, INT64(lanes)), lanes, past_caches)
    done = builder.mul(whole, INT64(lanes))
    with cgutils.for_range_slice(builder, done, count, INT64(1)) as (i, _):
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


@intrinsic
def _stream_line(typing_context, to, source, line):
    def emit(context, builder, signature, args):
        to, source, line = args
        vector = ir.VectorType(to.type.pointee, LINE // context.get_abi_sizeof(to.type.pointee))
        start = builder.mul(line, ir.Constant(line.type, vector.count))
        value = builder.load(
            builder.bitcast(builder.gep(source, [start]), vector.as_pointer()),
            align=LINE // vector.count,
        )
        place = builder.bitcast(builder.gep(to, [start]), vector.as_pointer())
        stored = builder.store(value, place, align=LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return context.get_dummy_value()

    return types.void(to, source, types.int64), emit


@intrinsic
def _per_line(typing_context, p):
    def emit(context, builder, signature, args):
        size = context.get_abi_sizeof(args[0].type.pointee)
        return INT64(LINE // size)

    return types.int64(p), emit


def stream(to, source, count):
    """Copy, past the caches, to a multiple of 64; after the last, `finish_writes`."""


@overload(stream)
def _stream(to, source, count):
    if to != source:  # rounded on the way: not worth a pass of its own

        def rounded(to, source, count):
            for j in range(count):
                store(to, j, load(source, j))

        return rounded

    def copied(to, source, count):
        lines = count // _per_line(to)
        for line in range(lines):
            _stream_line(to, source, line)
        done = lines * _per_line(to)
        for j in range(count - done):
            store(to, done + j, load(source, done + j))

    return copied


@intrinsic
def finish_writes(typing_context):
    """What was written past the caches is seen by other threads from here on."""

    def emit(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit
