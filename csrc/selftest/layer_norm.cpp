#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kEps = 0.1f;

// x, dy, weight, bias -> y, mean, rstd, dx, dweight, dbias.
template <typename Real>
std::vector<Values> reference(const Size& size, const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
  const Values &x = inputs[0], &dy = inputs[1], &weight = inputs[2], &bias = inputs[3];
  Values y(x.size()), mean(rows), rstd(rows), dx(x.size()), dweight(cols), dbias(cols);
  std::vector<Real> products(x.size());
  const auto n = static_cast<Real>(cols);
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols;
    const auto w = [&](size_t i) { return weight.empty() ? Real(1) : Real(weight[i]); };
    const auto b = [&](size_t i) { return bias.empty() ? Real(0) : Real(bias[i]); };
    const auto g = [&](size_t i) { return static_cast<Real>(dy[at + i]) * w(i); };
    const Real m = total<Real>(at, cols, [&](size_t i) { return static_cast<Real>(x[i]); }) / n;
    const auto centred = [&](size_t i) { return static_cast<Real>(x[at + i]) - m; };
    const Real squares = total<Real>(0, cols, [&](size_t i) { return centred(i) * centred(i); });
    const Real r = 1 / std::sqrt(squares / n + static_cast<Real>(kEps));
    const Real mean_g = total<Real>(0, cols, g) / n;
    const Real dot = total<Real>(0, cols, [&](size_t i) { return g(i) * (centred(i) * r); }) / n;
    mean[row] = m;
    rstd[row] = r;
    for (size_t i = 0; i < cols; ++i) {
      const Real xhat = centred(i) * r;
      y[at + i] = xhat * w(i) + b(i);
      dx[at + i] = r * (g(i) - mean_g - xhat * dot);
      products[at + i] = static_cast<Real>(dy[at + i]) * xhat;
    }
  }
  if (weight.empty()) return {y, mean, rstd, dx};
  for (size_t i = 0; i < cols; ++i) {
    dweight[i] = total<Real>(0, rows, [&](size_t row) { return products[row * cols + i]; });
    dbias[i] = total<Real>(0, rows, [&](size_t row) { return Real(dy[row * cols + i]); });
  }
  return {y, mean, rstd, dx, dweight, dbias};
}

Run run(const Size& size, const std::vector<Values>& inputs, DType dtype, DType weight_dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const int64_t parts = std::min<int64_t>(rows, 4);
  const bool weighted = !inputs[2].empty();
  const Array x(dtype, inputs[0], rows, stride), dy(dtype, inputs[1], rows, stride);
  const Array weight(weight_dtype, inputs[2]), bias(weight_dtype, inputs[3]);
  const Array y(dtype, rows * cols), dx(dtype, rows * cols);
  const Array mean(DType::f32, rows), rstd(DType::f32, rows);
  const Array dweight(weight_dtype, weighted ? cols : 0), dbias(weight_dtype, weighted ? cols : 0);
  const Array weight_sums(DType::f32, weighted ? parts * cols : 0);
  const Array bias_sums(DType::f32, weighted ? parts * cols : 0);
  must_succeed(
      layer_norm_forward(y.at(), mean.at<float>(), rstd.at<float>(), x.at(), weight.at(), bias.at(),
                         rows, cols, stride, kEps, dtype, weight_dtype, nullptr),
      "layer_norm_forward");
  must_succeed(layer_norm_backward(dx.at(), dweight.at(), dbias.at(), weight_sums.at<float>(),
                                   bias_sums.at<float>(), dy.at(), x.at(), weight.at(),
                                   mean.at<float>(), rstd.at<float>(), rows, cols, stride, stride,
                                   parts, dtype, weight_dtype, nullptr),
               "layer_norm_backward");
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "mean", DType::f32, 1, mean);
  keep(run, "rstd", DType::f32, 1, rstd);
  keep(run, "dx", dtype, cols, dx);
  if (weighted) {
    keep(run, "dweight", weight_dtype, 1, dweight);
    keep(run, "dbias", weight_dtype, 1, dbias);
  }
  return run;
}

}  // namespace

void layer_norm() {
  for (DType dtype : dtypes()) {
    int turn = 0;
    for (const Size& size : sizes()) {
      const int kind = turn++ % 4;  // both like x, both in fp32, only a weight, neither
      const DType weight_dtype = kind == 1 ? DType::f32 : dtype;
      const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                       normal(dtype, size.rows * size.cols, 2),
                                       kind == 3 ? Values() : normal(weight_dtype, size.cols, 3),
                                       kind >= 2 ? Values() : normal(weight_dtype, size.cols, 4)};
      report(
          case_name("layer_norm", dtype, size),
          [&] { return run(size, inputs, dtype, weight_dtype); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? reference<float>(size, given) : reference<double>(size, given);
          },
          inputs);
    }
  }
  must_refuse("layer_norm of no rows",
              layer_norm_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 8, 8,
                                 kEps, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
