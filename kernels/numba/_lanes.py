"""Floats in LLVM's IR, one or a vector of them, with the operators of Python.

A function of `Lanes` is written like one of tensors and becomes the body of a loop, in vectors and,
for what is left over, one by one: `_stream.loop_of`.
"""

import platform

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from tilewise.kernels.numba._parallel import INT32, INT64

FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()


def _features() -> set[str]:
    if numba.config.CPU_FEATURES:
        return {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name[:1] == "+"}
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


_FEATURES = _features()


def has(feature: str) -> bool:
    """Whether the CPU that is compiled for has what LLVM calls by this name."""
    return feature in _FEATURES


X86 = platform.machine().lower() in ("x86_64", "amd64")

# Fp32 numbers in a vector: 64 bytes with AVX-512, 32 with AVX2, 16 anywhere (SSE, NEON).
LANES = 16 if has("avx512f") else 8 if has("avx2") else 4


def lanes_of(scalar):
    """How many of an LLVM float are in a vector."""
    return LANES if scalar == FLOAT else LANES // 2


def vector_of(scalar):
    """The LLVM vector of this float."""
    return ir.VectorType(scalar, lanes_of(scalar))


def wider(scalar, lanes):
    """A vector of so many, or the scalar itself."""
    return scalar if lanes == 1 else ir.VectorType(scalar, lanes)


def splat(builder, value, vector):
    """`value` in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, INT32(0))
    zeros = ir.Constant(ir.VectorType(INT32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, undefined, zeros)


def constant(t, value):
    """The number `value` as a scalar, or in every lane of a vector."""
    if isinstance(t, ir.VectorType):
        return ir.Constant(t, [constant(t.element, value).constant] * t.count)
    if isinstance(t, ir.IntType):
        return ir.Constant(t, value)
    return ir.Constant(t, float(np.float32(value) if t == FLOAT else value))


def load_vector(builder, p, elements=0):
    """The vector at `p` + `elements`, aligned only as its elements are."""
    p = builder.gep(p, [INT64(elements) if isinstance(elements, int) else elements])
    scalar = p.type.pointee
    value = builder.load(builder.bitcast(p, vector_of(scalar).as_pointer()))
    value.align = 4 if scalar == FLOAT else 8
    return value


def store_vector(builder, value, p, elements=0):
    """Write the vector `value` to `p` + `elements`."""
    p = builder.gep(p, [INT64(elements) if isinstance(elements, int) else elements])
    stored = builder.store(value, builder.bitcast(p, value.type.as_pointer()))
    stored.align = 4 if p.type.pointee == FLOAT else 8


def call(builder, name, *args):
    """LLVM's intrinsic `name` on scalars or vectors."""
    t, vector = args[0].type, ""
    if isinstance(t, ir.VectorType):
        t, vector = t.element, f"v{t.count}"
    function = ir.FunctionType(args[0].type, [a.type for a in args])
    name = f"llvm.{name}.{vector}{'f32' if t == FLOAT else 'f64'}"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


# --- With operators.


def _operator(instruction):
    """Of `Lanes` and what stands to their right, and to their left."""

    def to_the_right(self, other):
        return self._made(instruction, self, other)

    def to_the_left(self, other):
        return self._made(instruction, other, self)

    return to_the_right, to_the_left


class Lanes:
    """A scalar or a vector; numbers beside it are in every lane."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def full(self, number):
        """A number in every lane."""
        return Lanes(self.builder, self.operand(number))

    def operand(self, other):
        """What LLVM takes for `other` beside this."""
        return other.value if isinstance(other, Lanes) else constant(self.value.type, other)

    def _made(self, instruction, *operands, **options):
        operands = map(self.operand, operands)
        return Lanes(self.builder, getattr(self.builder, instruction)(*operands, **options))

    __add__, __radd__ = _operator("fadd")
    __sub__, __rsub__ = _operator("fsub")
    __mul__, __rmul__ = _operator("fmul")
    __truediv__, __rtruediv__ = _operator("fdiv")

    def __neg__(self):
        return self._made("fneg", self)

    def __abs__(self):
        return Lanes(self.builder, call(self.builder, "fabs", self.value))

    def _compared(self, sign, other):
        flag = self.builder.fcmp_ordered(sign, self.value, self.operand(other))
        return Lanes(self.builder, flag)

    def __lt__(self, other):
        return self._compared("<", other)

    def __le__(self, other):
        return self._compared("<=", other)

    def __gt__(self, other):
        return self._compared(">", other)

    def equals(self, other):
        """Lane by lane; False beside NaN, as are all comparisons."""
        return self._compared("==", other)

    # With a flag of its own an instruction gets none of the house's, and stays as it is written.

    def without(self, other):
        """The difference by itself: `reassoc` would see that magic numbers cancel."""
        return self._made("fsub", self, other, flags=("nsz",))

    def times(self, other):
        """The product, rounded by itself: in no sum with what it is added to."""
        return self._made("fmul", self, other, flags=("nsz",))

    def halved(self, combine):
        """All lanes in one scalar: each half combined with the other until one is left."""
        builder, value = self.builder, self.value
        while isinstance(value.type, ir.VectorType):
            half = value.type.count // 2
            if half == 1:
                ends = (builder.extract_element(value, INT32(i)) for i in range(2))
                value = combine(*(Lanes(builder, end) for end in ends)).value
                continue
            undefined = ir.Constant(value.type, ir.Undefined)
            parts = []
            for start in (0, half):
                places = ir.Constant(ir.VectorType(INT32, half), list(range(start, start + half)))
                parts.append(Lanes(builder, builder.shuffle_vector(value, undefined, places)))
            value = combine(*parts).value
        return Lanes(builder, value)

    @property
    def is_double(self):
        return getattr(self.value.type, "element", self.value.type) == DOUBLE

    def by_libm(self, name):
        """The C library's function of each lane: for fp64, where exact beats fast."""
        t, vector = self.value.type, isinstance(self.value.type, ir.VectorType)
        kind = ir.FunctionType(DOUBLE, [DOUBLE])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        if not vector:
            return Lanes(self.builder, self.builder.call(function, [self.value]))
        result = ir.Constant(t, ir.Undefined)
        for i in range(t.count):
            one = self.builder.call(function, [self.builder.extract_element(self.value, INT32(i))])
            result = self.builder.insert_element(result, one, INT32(i))
        return Lanes(self.builder, result)


def where(condition, x, y):
    """x where the condition holds, else y; one of them is `Lanes`."""
    x, y = map((x if isinstance(x, Lanes) else y).operand, (x, y))
    return Lanes(condition.builder, condition.builder.select(condition.value, x, y))


def larger(x, y):
    """The larger; y where x is NaN."""
    return where(x > y, x, y)


def kept(x, factor):
    """x times what dropout says, 0 where that is 0, whatever x is; None is no dropout."""
    return x if factor is None else where(factor.equals(0.0), 0.0, x * factor)


def fma(x, y, z):
    """x * y + z, rounded once, and left in this order: `reassoc` moves terms of a plain sum."""
    lanes = next(v for v in (x, y, z) if isinstance(v, Lanes))
    return Lanes(lanes.builder, call(lanes.builder, "fma", *map(lanes.operand, (x, y, z))))


# 2**f on [-1/2, 1/2] is a polynomial; its error, with e**x = 2**n e**r, is 3.0 ulp at most
# (every float from -87.33 to 88.37).
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
_EXP_TERMS = (1 / 720, 0.0083334519, 0.041667115, 0.16666645, 0.5, 1.0, 1.0)
_EXP_LOWEST, _EXP_HIGHEST = -87.33, 89.0

# Added to a float of less than 2**22, it leaves the nearest whole number in the lowest bits.
_MAGIC = 1.5 * 2**23


def exp(x):
    """e**x: for fp32 0 below -87.33, inf above 88.37, NaN for NaN; libm's for fp64."""
    if x.is_double:
        return x.by_libm("exp")
    x = where(x > _EXP_HIGHEST, _EXP_HIGHEST, x)
    shifted = fma(x, _LOG2_E, _MAGIC)
    n = shifted.without(_MAGIC)
    r = fma(n, -_LN2_HIGH, x)
    r = fma(n, -_LN2_LOW, r)
    p = _EXP_TERMS[0]
    for term in _EXP_TERMS[1:]:
        p = fma(r, p, term)
    return where(x < _EXP_LOWEST, 0.0, p * _power(shifted))


def _power(shifted):
    """2**n where n is in the lowest bits."""
    builder, t = shifted.builder, shifted.value.type
    bits = wider(INT32, getattr(t, "count", 1))
    n = builder.add(builder.bitcast(shifted.value, bits), constant(bits, 127))
    return Lanes(builder, builder.bitcast(builder.shl(n, constant(bits, 23)), t))


# tanh(x) - x below 0.625, as x**3 times a polynomial in x**2: reweighted (Lawson) least squares on
# 2000 Chebyshev points; with the other branch at most 1.5 ulp off in fp32.
_TANH_TERMS = (-0.005717044696, 0.020650586113, -0.053743496537, 0.133314907551, -0.333332836628)
_TANH_SMALL = 0.625


def tanh(x):
    """The hyperbolic tangent: libm's for fp64."""
    if x.is_double:
        return x.by_libm("tanh")
    square = x * x
    p = _TANH_TERMS[0]
    for term in _TANH_TERMS[1:]:
        p = fma(square, p, term)
    small = fma(x * square, p, x)
    a = exp(-2.0 * abs(x))
    large = (1.0 - a) / (1.0 + a)
    large = where(x < 0.0, -large, large)
    return where(abs(x) > _TANH_SMALL, large, small)
