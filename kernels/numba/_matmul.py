"""Matrix products out of registers: microkernels written in LLVM's vector IR.

A BLAS call per tile reaches half of what the machine can do; these reach 97 to 100 % of the peak of
one core (2-core AMD Zen 5, fp32, 2026-11). A is read a scalar at a time with any two strides, so
either operand may be transposed where it lies; B and C are rows of vectors. Fp32 and fp64; and
words of two bf16 each, int32 to their pointers, which one instruction multiplies and adds.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from tilewise.kernels.numba._amx import is_tiled, multiply_in_tiles
from tilewise.kernels.numba._lanes import (
    LANES,
    X86,
    call,
    constant,
    lanes_of,
    load_vector,
    splat,
    store_vector,
    vector_of,
)
from tilewise.kernels.numba._parallel import INT32, INT64, callee
from tilewise.kernels.numba._simd import offset

# A panel is as wide as a microkernel, and its height times two vectors are accumulators: 16 of the
# 32 registers of AVX-512 and NEON, 8 of the 16 of AVX2.
PANEL = np.int64(2 * LANES)
HEIGHT = np.int64(4 if X86 and LANES < 16 else 8)

# The last argument of `multiply`. Numba compiles a function anew for every Python constant it is
# called with, but once for all int64.
SET, ADD = np.int64(0), np.int64(1)
UNIT = np.int64(1)

# A sum of products is taken in chains of at most so many, and two at least, the same ones whether a
# microkernel has one vector or two: the scores that the backward pass cuts into other blocks are
# those of the forward pass to the bit, or its probabilities would not be of the sums kept from it.
# One long chain is wrong by the root of its length. Dq in fp32 was up to 1.6 x what the rule allows
# with chains of 64 (D128, 2 % faster), 1.7 x with chains of 32 where a key had most of a row. Those
# of 8 take 4 %.
CHAIN = np.int64(16)


@intrinsic
def once(typing_context):
    """Compile the function that calls this once, not again in every caller: LLVM inlines it not."""

    def emit(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), emit


# --- The microkernel: C[HEIGHT, vectors] (+)= A[HEIGHT, depth] B[depth, vectors].


def _emit_step(builder, a, a_offsets, b, sums, vectors):
    """sums[HEIGHT, vectors] + one column of A times one row of B."""
    vector = sums[0].type
    if a.type.pointee == INT32:
        return _emit_pair_step(builder, a, a_offsets, b, sums, vectors)
    columns = [load_vector(builder, b, j * vector.count) for j in range(vectors)]
    scalars = [splat(builder, builder.load(builder.gep(a, [o])), vector) for o in a_offsets]
    return [
        call(builder, "fma", scalars[n // vectors], columns[n % vectors], total)
        for n, total in enumerate(sums)
    ]


def _emit_pair_step(builder, a, a_offsets, b, sums, vectors):
    """The same of two columns and two rows, in words of two bf16."""
    vector = sums[0].type
    words = ir.VectorType(INT32, vector.count)
    kind = ir.FunctionType(vector, [vector, words, words])
    dot = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * vector.count}"
    )
    columns = []
    for j in range(vectors):
        place = builder.gep(b, [INT64(j * vector.count)])
        column = builder.load(builder.bitcast(place, words.as_pointer()))
        column.align = 4
        columns.append(column)
    scalars = [splat(builder, builder.load(builder.gep(a, [o])), words) for o in a_offsets]
    return [
        builder.call(dot, [total, scalars[n // vectors], columns[n % vectors]])
        for n, total in enumerate(sums)
    ]


def _emit_product(builder, vectors, c, c_stride, a, a_row, a_step, b, b_stride, depth, old):
    vector = vector_of(c.type.pointee)
    a_offsets = [builder.mul(a_row, INT64(i)) for i in range(int(HEIGHT))]
    zeros = [constant(vector, 0)] * int(HEIGHT * vectors)
    before = builder.block
    step = builder.append_basic_block("step")
    end = builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", depth, INT64(0)), step, end)

    builder.position_at_end(step)
    k, a_now, b_now = builder.phi(INT64), builder.phi(a.type), builder.phi(b.type)
    sums = [builder.phi(vector) for _ in zeros]
    totals = _emit_step(builder, a_now, a_offsets, b_now, sums, vectors)
    k_next = builder.add(k, INT64(1))
    ends = [k_next, builder.gep(a_now, [a_step]), builder.gep(b_now, [b_stride]), *totals]
    for phi, value, start in zip(
        [k, a_now, b_now, *sums], ends, [INT64(0), a, b, *zeros], strict=True
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(value, step)
    builder.cbranch(builder.icmp_signed("<", k_next, depth), step, end)

    builder.position_at_end(end)
    found = [builder.phi(vector) for _ in zeros]
    for phi, value, start in zip(found, totals, zeros, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, step)
    _emit_results(builder, vectors, c, c_stride, found, old)


def _emit_results(builder, vectors, c, c_stride, totals, old):
    """Store the sums, or add them to what C holds."""
    places = []
    for n in range(len(totals)):
        row = builder.gep(c, [builder.mul(c_stride, INT64(n // vectors))])
        places.append((row, n % vectors * totals[0].type.count))
    with builder.if_else(builder.icmp_signed("!=", old, INT64(int(SET)))) as (add, put):
        with add:
            for total, place in zip(totals, places, strict=True):
                store_vector(builder, builder.fadd(load_vector(builder, *place), total), *place)
        with put:
            for total, place in zip(totals, places, strict=True):
                store_vector(builder, total, *place)


def _microkernel(vectors):
    @intrinsic
    def product(typing_context, c, c_stride, a, a_row, a_step, b, b_stride, depth, old):
        def emit(context, builder, signature, args):
            _emit_product(builder, vectors, *args)
            return context.get_dummy_value()

        i = types.int64
        return types.void(c, i, a, i, i, b, i, i, i), emit

    return product


_two_vectors, _one_vector = _microkernel(2), _microkernel(1)


@intrinsic
def lanes(typing_context, p):
    """How many elements of `p` are in a vector."""

    def emit(context, builder, signature, args):
        return INT64(lanes_of(args[0].type.pointee))

    return types.int64(p), emit


@callee
def _multiply_chain(c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old):
    width = lanes(c)
    pairs = cols // (2 * width)
    for pair in range(pairs):
        column = pair * 2 * width
        for block in range(rows // HEIGHT):
            i = block * HEIGHT
            _two_vectors(
                offset(c, i * c_stride + column), c_stride, offset(a, i * a_row), a_row, a_step,
                offset(b, column), b_stride, depth, old,
            )  # fmt: skip
    if cols > pairs * 2 * width:
        column = pairs * 2 * width
        for block in range(rows // HEIGHT):
            i = block * HEIGHT
            _one_vector(
                offset(c, i * c_stride + column), c_stride, offset(a, i * a_row), a_row, a_step,
                offset(b, column), b_stride, depth, old,
            )  # fmt: skip


@callee
def _multiply_chains(c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old):
    once()
    longest = min(CHAIN, (depth + 1) // 2)
    for chain in range((depth + longest - 1) // max(longest, 1)):
        start = chain * longest
        _multiply_chain(
            c, c_stride, offset(a, start * a_step), a_row, a_step,
            offset(b, start * b_stride), b_stride, rows, cols, min(longest, depth - start),
            old if chain == 0 else ADD,
        )  # fmt: skip


@callee
def _multiply_tiles(c, c_stride, a, a_row, b, b_stride, rows, cols, depth, old):
    once()
    multiply_in_tiles(c, c_stride, a, a_row, b, b_stride, rows, cols, depth, old)


def multiply(c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old):
    """C[rows, cols] = A[rows, depth] B[depth, cols], added to C where `old` is not SET.

    A[i, k] is `a[i * a_row + k * a_step]`. `rows` is a multiple of HEIGHT, `cols` of the lanes. Of
    words the depth is their number. For words in tiles `a_step` is 1: see `multiply_in_tiles`.
    """


@overload(multiply, inline="always")
def _multiply(c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old):
    if is_tiled(a):
        return lambda c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old: (
            _multiply_tiles(c, c_stride, a, a_row, b, b_stride, rows, cols, depth, old)
        )
    return lambda c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old: (
        _multiply_chains(c, c_stride, a, a_row, a_step, b, b_stride, rows, cols, depth, old)
    )


# --- Transposition: a square of vectors at a time, in registers.


@intrinsic
def _transpose_square(typing_context, to, to_stride, source, source_stride):
    def emit(context, builder, signature, args):
        to, to_stride, source, source_stride = args
        width = lanes_of(to.type.pointee)
        rows = [
            load_vector(builder, source, builder.mul(source_stride, INT64(i))) for i in range(width)
        ]
        half = width // 2
        while half:  # swap the off-diagonal quarters of every square of 2 * half
            low = [j if not j & half else width + j - half for j in range(width)]
            high = [j + half if not j & half else width + j for j in range(width)]
            for i in range(width):
                if not i & half:
                    pair = rows[i], rows[i + half]
                    for place, lanes in ((i, low), (i + half, high)):
                        order = ir.Constant(ir.VectorType(INT32, width), lanes)
                        rows[place] = builder.shuffle_vector(*pair, order)
            half //= 2
        for i, row in enumerate(rows):
            store_vector(builder, row, to, builder.mul(to_stride, INT64(i)))
        return context.get_dummy_value()

    i = types.int64
    return types.void(to, i, source, i), emit


@callee
def transpose(to, to_stride, source, source_stride, rows, cols):
    """to[cols, rows] = source[rows, cols], both sizes multiples of the lanes."""
    once()
    width = lanes(to)
    for row in range(rows // width):
        for col in range(cols // width):
            _transpose_square(
                offset(to, (col * to_stride + row) * width), to_stride,
                offset(source, (row * source_stride + col) * width), source_stride,
            )  # fmt: skip
