"""Activations and their slopes for glu and gelu, and kernels compiled once for each of them."""

import math

from tilewise.kernels.numba._lanes import exp, where
from tilewise.kernels.numba._parallel import Kernel

# (cdf(x) - 1/2) / x of the normal distribution as a ratio of polynomials in x**2, on |x| < 5.5:
# reweighted (Lawson) least squares on 8000 Chebyshev points against scipy's ndtr, the error
# weighted by x. 7e-9 off at most, 1e-7 with coefficients and arithmetic in fp32.
_LAST = 5.5  # x * cdf(-x) is 1e-7 beyond it
_P = (2.27493563e-08, 6.35210822e-06, 0.000168825547, 0.00467725998, 0.0338526427, 0.398942235)
_Q = (1.19750295e-06, 7.36474124e-05, 0.00188444428, 0.0286458681, 0.25152191, 1.0)


def _normal_cdf(x):
    """The normal distribution function: libm's erfc for fp64."""
    if x.is_double:
        return 0.5 * (x * -math.sqrt(0.5)).by_libm("erfc")
    t = x * x
    p, q = _P[0], _Q[0]
    for p_term, q_term in zip(_P[1:], _Q[1:], strict=True):
        p, q = t * p + p_term, t * q + q_term
    y = 0.5 + x * (p / q)
    return where(x > _LAST, 1.0, where(x < -_LAST, 0.0, y))


def _sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


def _sigmoid_slope(x):  # no digit cancels and nothing overflows
    a = exp(-abs(x))
    r = 1.0 / (1.0 + a)
    return where(x > 0.0, r, a * r), a * r * r


def _silu(x):
    return x / (1.0 + exp(-x))


def _silu_slope(x):
    s, slope = _sigmoid_slope(x)
    return x * s, s + x * slope


def _gelu(x):
    return x * _normal_cdf(x)


def _gelu_slope(x):
    cdf = _normal_cdf(x)
    density = 0.3989422804014327 * exp(-0.5 * x * x)
    return x * cdf, cdf + x * density


def _gelu_tanh(x):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
    u2 = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + exp(-u2))


def _gelu_tanh_slope(x):
    square = x * x
    u2 = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
    u2_slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    s, slope = _sigmoid_slope(u2)
    return x * s, s + x * slope * u2_slope


def _relu(x):  # NaN is not <= 0
    return where(x <= 0.0, 0.0, x)


def _relu_slope(x):
    return _relu(x), where(x <= 0.0, 0.0, x.full(1.0))


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
