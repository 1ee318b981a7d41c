"""Products of bf16 in the tiles of AMX (https://en.wikichip.org/wiki/x86/amx): registers of 16 rows
of 64 bytes, of which one instruction multiplies two and adds the product to a third, in fp32.

Intel's processors have them from Sapphire Rapids on. A process asks the system for them once, as
they make the state of its threads larger; a thread that uses them first says how large they are,
and at last that it needs them no more.
"""

import ctypes
import platform
from functools import lru_cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.numba._lanes import LANES, has
from tilewise.kernels.numba._parallel import INT8, INT64, callee
from tilewise.kernels.numba._simd import offset

SIDE = 16  # rows of a tile, and words or fp32 numbers of a row
_BYTES = 4 * SIDE  # of a row
_TILES = 8

# Of tiles: the sums of two by two, two of A, two of B.
_SUMS, _A, _B = 0, 4, 6

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache
def multiplies_tiles() -> bool:
    """Whether the CPU has tiles of bf16 and the system lets this process use them."""
    known = has("amx-tile") and has("amx-bf16") and has("avx512bf16") and LANES == SIDE
    if not known or platform.system() != "Linux":
        return False
    system = ctypes.CDLL(None)
    return bool(system.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def is_tiled(words) -> bool:
    """Whether AMX is to multiply what lies at this pointer: the kind of a word says so."""
    return words.dtype == types.uint32


def _emit(builder, name, *args):
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    name = f"llvm.x86.{name}"
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def use_tiles(typing_context, words):
    """Make all tiles of this thread as large as they can be, if words are multiplied in tiles."""

    def emit(context, builder, signature, args):
        if is_tiled(words):
            sizes = [1] + 63 * [0]  # the palette, and from 16 and 48 on what rows and tiles have
            for tile in range(_TILES):
                sizes[16 + 2 * tile], sizes[48 + tile] = _BYTES, SIDE
            value = ir.Constant(ir.ArrayType(INT8, 64), sizes)
            place = cgutils.global_constant(builder, "tiles", value)
            _emit(builder, "ldtilecfg", builder.bitcast(place, INT8.as_pointer()))
        return context.get_dummy_value()

    return types.void(words), emit


@intrinsic
def release_tiles(typing_context, words):
    """Give them back: a thread with tiles in use has more to save wherever it is interrupted."""

    def emit(context, builder, signature, args):
        if is_tiled(words):
            _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(words), emit


def _emit_products(builder, height, width, c, c_stride, a, a_row, b, b_stride, steps, adds):
    """C[height, width] (+)= A[height, steps] B[steps, width], all sizes in tiles."""

    def at(p, elements):
        return builder.bitcast(builder.gep(p, [elements]), INT8.as_pointer())

    def scaled(stride, count):
        return builder.mul(stride, INT64(count))

    lines = [scaled(stride, 4) for stride in (c_stride, a_row, b_stride)]
    sums = [
        (INT8(_SUMS + 2 * i + j), at(c, builder.add(scaled(c_stride, SIDE * i), INT64(SIDE * j))))
        for i in range(height)
        for j in range(width)
    ]
    with builder.if_else(adds) as (add, put):
        with add:
            for tile, place in sums:
                _emit(builder, "tileloadd64", tile, place, lines[0])
        with put:
            for tile, _ in sums:
                _emit(builder, "tilezero", tile)
    with cgutils.for_range(builder, steps) as loop:
        deep = builder.mul(loop.index, INT64(SIDE))
        down = builder.mul(deep, b_stride)
        for j in range(width):
            place = at(b, builder.add(down, INT64(SIDE * j)))
            _emit(builder, "tileloadd64", INT8(_B + j), place, lines[2])
        for i in range(height):
            place = at(a, builder.add(deep, scaled(a_row, SIDE * i)))
            _emit(builder, "tileloadd64", INT8(_A + i), place, lines[1])
            for j in range(width):
                total = INT8(_SUMS + 2 * i + j)
                _emit(builder, "tdpbf16ps", total, INT8(_A + i), INT8(_B + j))
    for tile, place in sums:
        _emit(builder, "tilestored64", tile, place, lines[0])


def _block(height, width):
    @intrinsic
    def products(typing_context, c, c_stride, a, a_row, b, b_stride, steps, old):
        def emit(context, builder, signature, args):
            *args, old = args
            adds = builder.icmp_signed("!=", old, INT64(0))
            _emit_products(builder, height, width, *args, adds)
            return context.get_dummy_value()

        i = types.int64
        return types.void(c, i, a, i, b, i, i, i), emit

    return products


_two_by_two, _two_by_one, _one_by_two, _one_by_one = (
    _block(height, width) for height in (2, 1) for width in (2, 1)
)


@callee
def multiply_in_tiles(c, c_stride, a, a_row, b, b_stride, rows, cols, depth, old):
    """`multiply`, with all sizes rounded up to whole tiles: rows of A and columns of B beyond make
    rows and columns of C beyond, but words beyond the depth are to be zeros in both."""
    tall, wide = (rows + SIDE - 1) // SIDE, (cols + SIDE - 1) // SIDE
    steps = (depth + SIDE - 1) // SIDE
    for i in range(0, tall, 2):
        x, z = offset(a, i * SIDE * a_row), offset(c, i * SIDE * c_stride)
        for j in range(0, wide, 2):
            y, to = offset(b, j * SIDE), offset(z, j * SIDE)
            if i + 1 < tall:
                if j + 1 < wide:
                    _two_by_two(to, c_stride, x, a_row, y, b_stride, steps, old)
                else:
                    _two_by_one(to, c_stride, x, a_row, y, b_stride, steps, old)
            elif j + 1 < wide:
                _one_by_two(to, c_stride, x, a_row, y, b_stride, steps, old)
            else:
                _one_by_one(to, c_stride, x, a_row, y, b_stride, steps, old)
