#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kEps = 0.1f;

// x, dy, weight -> y, rstd, dx, dweight.
template <typename Real>
std::vector<Values> reference(const Size& size, const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
  const Values &x = inputs[0], &dy = inputs[1], &weight = inputs[2];
  Values y(x.size()), rstd(rows), dx(x.size()), dweight(cols);
  std::vector<Real> products(x.size());
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols;
    const auto value = [&](size_t i) { return static_cast<Real>(x[at + i]); };
    const auto w = [&](size_t i) { return weight.empty() ? Real(1) : Real(weight[i]); };
    const auto g = [&](size_t i) { return static_cast<Real>(dy[at + i]) * w(i); };
    const Real squares = total<Real>(0, cols, [&](size_t i) { return value(i) * value(i); });
    const Real r = 1 / std::sqrt(squares / static_cast<Real>(cols) + static_cast<Real>(kEps));
    const Real dot = total<Real>(0, cols, [&](size_t i) { return g(i) * (value(i) * r); });
    rstd[row] = r;
    for (size_t i = 0; i < cols; ++i) {
      const Real xhat = value(i) * r;
      y[at + i] = xhat * w(i);
      dx[at + i] = r * (g(i) - xhat * (dot / static_cast<Real>(cols)));
      products[at + i] = static_cast<Real>(dy[at + i]) * xhat;
    }
  }
  if (weight.empty()) return {y, rstd, dx};
  for (size_t i = 0; i < cols; ++i) {
    dweight[i] = total<Real>(0, rows, [&](size_t row) { return products[row * cols + i]; });
  }
  return {y, rstd, dx, dweight};
}

Run run(const Size& size, const std::vector<Values>& inputs, DType dtype, DType weight_dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const int64_t parts = std::min<int64_t>(rows, 4);
  const bool weighted = !inputs[2].empty();
  const Array x(dtype, inputs[0], rows, stride), dy(dtype, inputs[1], rows, stride);
  const Array weight(weight_dtype, inputs[2]), y(dtype, rows * cols), dx(dtype, rows * cols);
  const Array rstd(DType::f32, rows), dweight(weight_dtype, weighted ? cols : 0);
  const Array sums(DType::f32, weighted ? parts * cols : 0);
  must_succeed(rms_norm_forward(y.at(), rstd.at<float>(), x.at(), weight.at(), rows, cols, stride,
                                kEps, dtype, weight_dtype, nullptr),
               "rms_norm_forward");
  must_succeed(rms_norm_backward(dx.at(), dweight.at(), sums.at<float>(), dy.at(), x.at(),
                                 weight.at(), rstd.at<float>(), rows, cols, stride, stride, parts,
                                 dtype, weight_dtype, nullptr),
               "rms_norm_backward");
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "rstd", DType::f32, 1, rstd);
  keep(run, "dx", dtype, cols, dx);
  if (weighted) keep(run, "dweight", weight_dtype, 1, dweight);
  return run;
}

}  // namespace

void rms_norm() {
  for (DType dtype : dtypes()) {
    int turn = 0;
    for (const Size& size : sizes()) {
      const int kind = turn++ % 3;  // a weight like x, one in fp32, none
      const DType weight_dtype = kind == 1 ? DType::f32 : dtype;
      const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                       normal(dtype, size.rows * size.cols, 2),
                                       kind == 2 ? Values() : normal(weight_dtype, size.cols, 3)};
      report(
          case_name("rms_norm", dtype, size),
          [&] { return run(size, inputs, dtype, weight_dtype); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? reference<float>(size, given) : reference<double>(size, given);
          },
          inputs);
    }
  }
  must_refuse("rms_norm of no rows", rms_norm_forward(nullptr, nullptr, nullptr, nullptr, 0, 8, 8,
                                                      kEps, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
