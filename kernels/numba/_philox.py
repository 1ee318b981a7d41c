"""Philox4x32-10 by logical position: the words that every backend draws.

Emitted as LLVM IR, one 64-bit lane a counter: the multiplication of two 32-bit words is then one
instruction, eight counters wide where the host has AVX-512.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _full(t, number):
    """A number of this type, in every lane if it is a vector."""
    return ir.Constant(t, [number] * t.count if isinstance(t, ir.VectorType) else number)


def _low(builder, value):
    return builder.and_(value, _full(value.type, 0xFFFFFFFF))


def _high(builder, value):
    return builder.lshr(value, _full(value.type, 32))


def emit_philox(builder, seed, offset, row, group):
    """The four words, each in the low half of an i64, or of those of a vector."""
    a, b, c, d = (
        _low(builder, group), _low(builder, row), _low(builder, offset), _high(builder, offset),
    )  # fmt: skip
    low, high = _low(builder, seed), _high(builder, seed)
    for _ in range(ROUNDS):
        from_a = builder.mul(a, _full(a.type, MULTIPLIERS[0]))
        from_c = builder.mul(c, _full(a.type, MULTIPLIERS[1]))
        a = builder.xor(builder.xor(_high(builder, from_c), b), low)
        c = builder.xor(builder.xor(_high(builder, from_a), d), high)
        b, d = _low(builder, from_c), _low(builder, from_a)
        low = _low(builder, builder.add(low, _full(a.type, KEY_STEPS[0])))
        high = _low(builder, builder.add(high, _full(a.type, KEY_STEPS[1])))
    return a, b, c, d


@intrinsic
def philox(typing_context, seed, offset, row, group):
    """The four uint32 words of a group of columns, from int64 seed, offset, row and group."""
    result = types.UniTuple(types.uint32, 4)

    def emit(context, builder, signature, args):
        words = [builder.trunc(word, INT32) for word in emit_philox(builder, *args)]
        return cgutils.pack_array(builder, words)

    return result(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic
def uniform(typing_context, word):
    """(word + 1/2) / 2^32 in fp32, rounded once and at most the number before 1."""

    def emit(context, builder, signature, args):
        word = args[0]
        upper = builder.uitofp(builder.lshr(word, INT32(8)), FLOAT)
        lower = builder.uitofp(builder.and_(word, INT32(255)), FLOAT)
        lower = builder.fmul(builder.fadd(lower, FLOAT(0.5)), FLOAT(2.0**-32))
        value = builder.fadd(builder.fmul(upper, FLOAT(2.0**-24)), lower)
        below_one = FLOAT(1 - 2.0**-24)
        return builder.select(builder.fcmp_ordered("<", value, below_one), value, below_one)

    return types.float32(types.uint32), emit


@intrinsic
def keep(typing_context, word, threshold):
    """Whether dropout keeps an element; the threshold is floor(p * 2^32), so 2^32 keeps none."""

    def emit(context, builder, signature, args):
        return builder.icmp_unsigned(">=", builder.zext(args[0], INT64), args[1])

    return types.boolean(types.uint32, types.int64), emit
