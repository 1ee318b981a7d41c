"""Rows written a chunk at a time: computed into scratch, rounded there, and past the caches.

LLVM's vectoriser takes four lanes where a loop ends in 16-bit floats, and sixteen where it ends in
fp32; and a store that does not first read the line it fills is 1.5 to 1.8 x as fast where the
output is larger than the caches (one thread of an AMD Zen 5, 4096 x 1024 in fp32, 2026-11).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from tilewise.kernels.numba._matmul import vector_of
from tilewise.kernels.numba._parallel import INT32, INT64
from tilewise.kernels.numba._simd import BRAIN, HALF, _wide

CHUNK = np.int64(1024)  # elements: two chunks of scratch and two of inputs stay in L1
LINE = 64  # bytes

# Below this an output is likely to be read again from the caches, and worth keeping there.
STREAMED_BYTES = 1 << 23


def streamed(*outs: Tensor) -> bool:
    """Whether to write these rows past the caches: large, each beginning on a cache line."""
    return all(
        out.nbytes >= STREAMED_BYTES
        and out.data_ptr() % LINE == 0
        and out.shape[-1] * out.itemsize % LINE == 0
        for out in outs
    )


@intrinsic
def scratch(typing_context, p):
    """A chunk of the floats that arithmetic on the kind of `p` is done in, this function's own."""
    wide = _wide(p.dtype)

    def emit(context, builder, signature, args):
        size = ir.ArrayType(context.get_value_type(wide), int(CHUNK))
        slot = cgutils.alloca_once(builder, size)
        slot.align = LINE
        return builder.bitcast(slot, size.element.as_pointer())

    return types.CPointer(wide)(p), emit


def _rounded(builder, value, kind):
    """A scalar or vector of fp32 or fp64 as `kind` is stored."""
    if kind not in (types.int16, types.uint16):
        return value
    half, bits = HALF if kind == types.int16 else BRAIN, ir.IntType(16)
    if isinstance(value.type, ir.VectorType):
        half, bits = (ir.VectorType(t, value.type.count) for t in (half, bits))
    return builder.bitcast(builder.fptrunc(value, half), bits)


@intrinsic
def chunk_of(typing_context, to, source, streamed):
    """Where to compute what `write_chunk` writes: in scratch, or at once in place if it can be."""

    def emit(context, builder, signature, args):
        to, source, streamed = args
        return builder.select(streamed, source, to) if to.type == source.type else source

    return source(to, source, types.boolean), emit


@intrinsic
def write_chunk(typing_context, to, source, count, streamed):
    """Round `count` elements to the kind of `to`, and write them there unless they are there."""
    kind = to.dtype

    def emit(context, builder, signature, args):
        to, source, count, streamed = args
        vector = vector_of(source.type.pointee)
        whole = builder.sdiv(count, INT64(vector.count))

        def write_vectors(past_caches):
            with cgutils.for_range(builder, whole) as loop:
                start = builder.mul(loop.index, INT64(vector.count))
                place = builder.bitcast(builder.gep(source, [start]), vector.as_pointer())
                value = builder.load(place)
                value.align = LINE // 4
                value = _rounded(builder, value, kind)
                size = value.type.count * kind.bitwidth // 8
                target = builder.bitcast(builder.gep(to, [start]), value.type.as_pointer())
                stored = builder.store(value, target)
                stored.align = size if past_caches else kind.bitwidth // 8
                if past_caches:
                    always = builder.module.add_metadata([INT32(1)])
                    stored.set_metadata("nontemporal", always)

        places = (builder.ptrtoint(p, INT64) for p in (to, source))
        with builder.if_then(builder.icmp_unsigned("!=", *places)):
            with builder.if_else(streamed) as (yes, no):
                with yes:
                    write_vectors(True)
                with no:
                    write_vectors(False)
            done = builder.mul(whole, INT64(vector.count))
            with cgutils.for_range_slice(builder, done, count, INT64(1)) as (i, _):
                value = _rounded(builder, builder.load(builder.gep(source, [i])), kind)
                builder.store(value, builder.gep(to, [i]))
        return context.get_dummy_value()

    return types.void(to, source, types.int64, types.boolean), emit


@intrinsic
def finish_writes(typing_context):
    """What was written past the caches is seen by other threads from here on."""

    def emit(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit
