// Activations and their slopes, as textbooks have them.
#pragma once

#include <cmath>

#include "launchers.h"

namespace tilewise::selftest {

template <typename Real>
struct ValueAndSlope {
  Real value, slope;
};

template <typename Real>
ValueAndSlope<Real> activate(Activation activation, Real x) {
  const Real kSqrtHalf = std::sqrt(Real(0.5)), kPi = std::acos(Real(-1));
  const Real logistic = 1 / (1 + std::exp(-x));
  switch (activation) {
    case Activation::silu: return {x * logistic, logistic * (1 + x * (1 - logistic))};
    case Activation::sigmoid: return {logistic, logistic * (1 - logistic)};
    case Activation::relu: return {x > 0 ? x : Real(0), x > 0 ? Real(1) : Real(0)};
    case Activation::gelu: {
      const Real cdf = (1 + std::erf(x * kSqrtHalf)) / 2;
      return {x * cdf, cdf + x * std::exp(-x * x / 2) / std::sqrt(2 * kPi)};
    }
    case Activation::gelu_tanh: break;
  }
  const Real cubic = Real(0.044715), factor = std::sqrt(2 / kPi);
  const Real t = std::tanh(factor * (x + cubic * x * x * x));
  return {x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * factor * (1 + 3 * cubic * x * x)};
}

}  // namespace tilewise::selftest
