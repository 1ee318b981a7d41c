#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kScale = 1.5f;

// x, dy -> y, dx.
template <typename Real>
std::vector<Values> reference(const Size& size, bool log, const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
  const Values &x = inputs[0], &dy = inputs[1];
  Values y(x.size()), dx(x.size());
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols;
    const auto t = [&](size_t i) { return static_cast<Real>(x[at + i]) * Real(kScale); };
    const auto g = [&](size_t i) { return static_cast<Real>(dy[at + i]); };
    Real m = t(0);
    for (size_t i = 1; i < cols; ++i) m = std::max(m, t(i));
    const Real sum = total<Real>(0, cols, [&](size_t i) { return std::exp(t(i) - m); });
    const auto p = [&](size_t i) { return std::exp(t(i) - m) / sum; };
    const Real dot = total<Real>(0, cols, [&](size_t i) { return log ? g(i) : g(i) * p(i); });
    for (size_t i = 0; i < cols; ++i) {
      y[at + i] = log ? t(i) - m - std::log(sum) : p(i);
      dx[at + i] = Real(kScale) * (log ? g(i) - p(i) * dot : p(i) * (g(i) - dot));
    }
  }
  return {y, dx};
}

Run run(const Size& size, bool log, const std::vector<Values>& inputs, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const Array x(dtype, inputs[0], rows, stride), dy(dtype, inputs[1], rows, stride);
  const Array y(dtype, rows * cols), dx(dtype, rows * cols);
  must_succeed(softmax_forward(y.at(), x.at(), rows, cols, stride, kScale, log, dtype, nullptr),
               "softmax_forward");
  must_succeed(softmax_backward(dx.at(), dy.at(), y.at(), rows, cols, stride, cols, kScale, log,
                                dtype, nullptr),
               "softmax_backward");
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "dx", dtype, cols, dx);
  return run;
}

}  // namespace

void softmax() {
  for (bool log : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                         normal(dtype, size.rows * size.cols, 2)};
        report(
            case_name(log ? "log_softmax" : "softmax", dtype, size),
            [&] { return run(size, log, inputs, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, log, given)
                            : reference<double>(size, log, given);
            },
            inputs);
      }
    }
  }
  must_refuse("softmax of no rows",
              softmax_forward(nullptr, nullptr, 0, 8, 8, kScale, false, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
