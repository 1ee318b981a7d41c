#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kScale = 1.5f, kSoftcap = 2.f;
constexpr int64_t kHeads = 2;  // share one bias

// An even number of rows is that of two heads.
int64_t heads_of(const Size& size) { return size.rows % kHeads ? 1 : kHeads; }
int64_t lines_of(const Size& size) { return size.rows / heads_of(size); }

// x, dy, bias [lines, cols] -> y, dx, dbias; a row sees no later column, and one that sees none is
// 0.
template <typename Real>
std::vector<Values> reference(const Size& size, bool log, const std::vector<Values>& inputs) {
  const int64_t rows = size.rows, cols = size.cols, lines = lines_of(size);
  const Values &x = inputs[0], &dy = inputs[1], &bias = inputs[2];
  Values y(x.size(), log ? -INFINITY : 0.0), dx(x.size()), dbias(bias.size());
  std::vector<Real> sums(bias.size());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t query = row % lines;
    const auto seen =
        static_cast<size_t>(std::min(std::max<int64_t>(query + 1 + cols - lines, 0), cols));
    if (seen == 0) continue;
    const auto at = static_cast<size_t>(row * cols), line = static_cast<size_t>(query * cols);
    const auto tanh_of = [&](size_t i) {
      return std::tanh(static_cast<Real>(x[at + i]) * Real(kScale) / Real(kSoftcap));
    };
    const auto s = [&](size_t i) {
      return Real(kSoftcap) * tanh_of(i) + static_cast<Real>(bias[line + i]);
    };
    const auto g = [&](size_t i) { return static_cast<Real>(dy[at + i]); };
    Real m = s(0);
    for (size_t i = 1; i < seen; ++i) m = std::max(m, s(i));
    const Real sum = total<Real>(0, seen, [&](size_t i) { return std::exp(s(i) - m); });
    const auto p = [&](size_t i) { return std::exp(s(i) - m) / sum; };
    const Real dot = log ? total<Real>(0, static_cast<size_t>(cols), g)
                         : total<Real>(0, seen, [&](size_t i) { return g(i) * p(i); });
    for (size_t i = 0; i < seen; ++i) {
      y[at + i] = log ? s(i) - m - std::log(sum) : p(i);
      const Real ds = log ? g(i) - p(i) * dot : p(i) * (g(i) - dot);
      sums[line + i] += ds;
      dx[at + i] = Real(kScale) * ds * (Real(1) - tanh_of(i) * tanh_of(i));
    }
  }
  std::copy(sums.begin(), sums.end(), dbias.begin());
  return {y, dx, dbias};
}

Run run(const Size& size, bool log, const std::vector<Values>& inputs, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const int64_t heads = heads_of(size), lines = lines_of(size);
  const Array x(dtype, inputs[0], rows, stride), dy(dtype, inputs[1], rows, stride);
  const Array bias(dtype, inputs[2], lines, stride);
  const Array y(dtype, rows * cols), dx(dtype, rows * cols), totals(DType::f32, rows),
      seen(DType::f32, rows), dbias(DType::f32, lines * cols);
  must_succeed(scored_softmax_forward(y.at(), x.at(), bias.at(), nullptr, rows, cols, heads, lines,
                                      stride, 0, 0, stride, 1, 0, 0, 0, 0, kScale, kSoftcap, true,
                                      true, log, dtype, dtype, nullptr),
               "scored_softmax_forward");
  must_succeed(
      scored_softmax_backward(dx.at(), totals.at<float>(), seen.at<int>(), dy.at(), y.at(), x.at(),
                              nullptr, rows, cols, heads, lines, stride, cols, stride, 0, 0, 0, 0,
                              kScale, kSoftcap, true, true, log, dtype, nullptr),
      "scored_softmax_backward");
  must_succeed(
      scored_softmax_dbias(dbias.at<float>(), dy.at(), y.at(), totals.at<float>(), seen.at<int>(),
                           nullptr, lines, cols, heads, lines, 1, lines, rows / lines, 1, stride,
                           cols, 0, 0, 0, 0, true, log, dtype, nullptr),
      "scored_softmax_dbias");
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "dx", dtype, cols, dx);
  keep(run, "dbias", dtype, cols, dbias);  // in fp32, from a y that was rounded
  return run;
}

}  // namespace

void scored_softmax() {
  for (bool log : {false, true}) {
    for (DType dtype : dtypes()) {
      if (log && dtype != DType::f32) continue;  // the rest is the same code
      for (const Size& size : sizes()) {
        const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                         normal(dtype, size.rows * size.cols, 2),
                                         normal(dtype, lines_of(size) * size.cols, 3)};
        report(
            case_name(log ? "scored_log_softmax" : "scored_softmax", dtype, size),
            [&] { return run(size, log, inputs, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, log, given)
                            : reference<double>(size, log, given);
            },
            inputs);
      }
    }
  }
}

}  // namespace tilewise::selftest
