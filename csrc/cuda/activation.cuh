// Activations and their slopes, at x in fp32.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"

namespace tilewise {

struct ValueAndSlope {
  float value, slope;
};

// (cdf(x) - 1/2) / x of the normal distribution as a ratio of polynomials in x^2 on |x| < 5.5: the
// fit of kernels/numba/_activations.py, 1e-7 off at most. Half the instructions of erff, which
// would bound gelu by their issue and not by memory.
__device__ inline float normal_cdf(float x) {
  constexpr float kLast = 5.5f;  // x * cdf(-x) is 1e-7 beyond it
  const float t = x * x;
  float p = 2.27493563e-08f, q = 1.19750295e-06f;
  p = p * t + 6.35210822e-06f, q = q * t + 7.36474124e-05f;
  p = p * t + 0.000168825547f, q = q * t + 0.00188444428f;
  p = p * t + 0.00467725998f, q = q * t + 0.0286458681f;
  p = p * t + 0.0338526427f, q = q * t + 0.25152191f;
  p = p * t + 0.398942235f, q = q * t + 1.f;
  float y = 0.5f + x * __fdividef(p, q);
  y = x < -kLast ? 0.f : y;
  return x > kLast ? 1.f : y;
}

// 1 / (1 + exp(-x)): no digit cancels and nothing overflows.
__device__ inline ValueAndSlope logistic(float x) {
  const float a = expf(-fabsf(x));
  const float r = __fdividef(1.f, 1.f + a);
  return {x > 0.f ? r : a * r, a * r * r};
}

// The compiler drops what is not used.
template <Activation kActivation>
__device__ ValueAndSlope activate(float x) {
  if constexpr (kActivation == Activation::silu) {
    const ValueAndSlope s = logistic(x);
    return {x * s.value, s.value + x * s.slope};
  } else if constexpr (kActivation == Activation::gelu) {
    const float cdf = normal_cdf(x);
    return {x * cdf, cdf + x * (0.3989422804014327f * expf(-0.5f * x * x))};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
    constexpr float kTwice = 1.5957691216057308f;
    const float square = x * x;
    const ValueAndSlope s = logistic(kTwice * x * (1.f + 0.044715f * square));
    return {x * s.value, s.value + x * s.slope * (kTwice * (1.f + 0.134145f * square))};
  } else if constexpr (kActivation == Activation::relu) {
    return {x <= 0.f ? 0.f : x, x <= 0.f ? 0.f : 1.f};  // NaN is not <= 0
  } else {
    static_assert(kActivation == Activation::sigmoid);
    return logistic(x);
  }
}

template <Activation kActivation>
struct ActivationOf {
  static constexpr Activation value = kActivation;
};

// Call body with the activation as a constant.
template <typename Body>
cudaError_t for_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::silu: return body(ActivationOf<Activation::silu>{});
    case Activation::gelu: return body(ActivationOf<Activation::gelu>{});
    case Activation::gelu_tanh: return body(ActivationOf<Activation::gelu_tanh>{});
    case Activation::relu: return body(ActivationOf<Activation::relu>{});
    case Activation::sigmoid: return body(ActivationOf<Activation::sigmoid>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace tilewise
