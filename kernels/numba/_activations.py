"""Activations and their slopes for glu and gelu, and kernels compiled once for each of them."""

import math

import numba
from numba import types
from numba.extending import overload

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._simd import exp, real

inline = numba.njit(inline="always")  # a call would keep the loop around it from vectorising


# (cdf(x) - 1/2) / x of the normal distribution as a ratio of polynomials in x**2, on |x| < 5.5:
# reweighted (Lawson) least squares on 8000 Chebyshev points against scipy's ndtr, the error
# weighted by x. 7e-9 off at most, 1e-7 with coefficients and arithmetic in fp32.
_LAST = 5.5  # x * cdf(-x) is 1e-7 beyond it
_P = (2.27493563e-08, 6.35210822e-06, 0.000168825547, 0.00467725998, 0.0338526427, 0.398942235)
_Q = (1.19750295e-06, 7.36474124e-05, 0.00188444428, 0.0286458681, 0.25152191, 1.0)


def normal_cdf(x):
    """The normal distribution function: a ratio of polynomials for fp32, libm's erfc for fp64."""


@overload(normal_cdf, inline="always")
def _normal_cdf(x):
    if x == types.float64:
        return lambda x: 0.5 * math.erfc(x * -math.sqrt(0.5))

    def cdf(x):
        t = x * x
        p, q = real(x, _P[0]), real(x, _Q[0])
        p, q = p * t + real(x, _P[1]), q * t + real(x, _Q[1])
        p, q = p * t + real(x, _P[2]), q * t + real(x, _Q[2])
        p, q = p * t + real(x, _P[3]), q * t + real(x, _Q[3])
        p, q = p * t + real(x, _P[4]), q * t + real(x, _Q[4])
        p, q = p * t + real(x, _P[5]), q * t + real(x, _Q[5])
        y = real(x, 0.5) + x * (p / q)
        low = real(x, 0.0) if x < real(x, -_LAST) else y
        return real(x, 1.0) if x > real(x, _LAST) else low

    return cdf


@inline
def _sigmoid(x):
    return real(x, 1) / (real(x, 1) + exp(-x))


@inline
def _sigmoid_slope(x):  # no digit cancels and nothing overflows
    a = exp(-abs(x))
    r = real(x, 1) / (real(x, 1) + a)
    return r if x > real(x, 0) else a * r, a * r * r


@inline
def _silu(x):
    return x / (real(x, 1) + exp(-x))


@inline
def _silu_slope(x):
    s, slope = _sigmoid_slope(x)
    return x * s, s + x * slope


@inline
def _gelu(x):
    return x * normal_cdf(x)


@inline
def _gelu_slope(x):
    cdf = normal_cdf(x)
    density = real(x, 0.3989422804014327) * exp(real(x, -0.5) * x * x)
    return x * cdf, cdf + x * density


@inline
def _gelu_tanh(x):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
    u2 = real(x, 1.5957691216057308) * x * (real(x, 1) + real(x, 0.044715) * x * x)
    return x / (real(x, 1) + exp(-u2))


@inline
def _gelu_tanh_slope(x):
    square = x * x
    u2 = real(x, 1.5957691216057308) * x * (real(x, 1) + real(x, 0.044715) * square)
    u2_slope = real(x, 1.5957691216057308) * (real(x, 1) + real(x, 0.134145) * square)
    s, slope = _sigmoid_slope(u2)
    return x * s, s + x * slope * u2_slope


@inline
def _relu(x):  # NaN is not <= 0
    return real(x, 0) if x <= real(x, 0) else x


@inline
def _relu_slope(x):
    return _relu(x), real(x, 0) if x <= real(x, 0) else real(x, 1)


# Of each the value, and the value with its slope.
_ACTIVATIONS = {
    "silu": (_silu, _silu_slope),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "relu": (_relu, _relu_slope),
    "sigmoid": (_sigmoid, _sigmoid_slope),
}


def forward_kernels(make):
    """Kernels by name of activation; `make` builds a task's function around x -> value."""
    return {name: _kernel(make, name, value) for name, (value, _) in _ACTIVATIONS.items()}


def backward_kernels(make):
    """Kernels by name of activation; `make` builds a task's function around x -> value, slope."""
    return {name: _kernel(make, name, slope) for name, (_, slope) in _ACTIVATIONS.items()}


def _kernel(make, name, activation):
    body = make(activation)
    body.__qualname__ = f"{make.__qualname__}.{name}"  # what compiled code is kept under
    return Kernel(body)
