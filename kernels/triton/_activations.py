"""Activations and their slopes, in what the interpreter and the compiler share."""

import triton
import triton.language as tl


@triton.jit
def _logistic(x):
    """1 / (1 + exp(-x)) and its slope, of which no digit cancels and nothing overflows."""
    a = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + a)
    return tl.where(x > 0.0, r, a * r), a * r * r


@triton.jit
def tanh(x):
    """No digit cancels near 0, and nothing overflows."""
    square = x * x
    p = -0.005717044696 * square + 0.020650586113
    p = p * square - 0.053743496537
    p = p * square + 0.133314907551
    p = p * square - 0.333332836628
    a = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - a) / (1.0 + a)
    return tl.where(tl.abs(x) > 0.625, tl.where(x < 0.0, -large, large), x + x * square * p)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation's value at fp32 `x` and its slope; the compiler drops what is not used."""
    if ACTIVATION == "silu":
        s, slope = _logistic(x)
        value = x * s
        slope = s + x * slope
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        square = x * x
        s, slope = _logistic(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value = x * s
        slope = s + x * slope * (1.5957691216057308 * (1.0 + 0.134145 * square))
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0.0, 0.0, x)  # NaN is not <= 0
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        value, slope = _logistic(x)
    return value, slope
