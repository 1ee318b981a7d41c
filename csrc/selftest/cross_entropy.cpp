#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

struct Numbers {
  int64_t ignore_index;
  float smoothing, z_loss, cap, scale;
};

constexpr Numbers kPlain{1, 0.f, 0.f, 0.f, 1.f}, kAll{1, 0.1f, 0.01f, 3.f, 1.5f};

size_t target_of(size_t row, size_t cols) { return row * 7 % cols; }

std::vector<int64_t> targets(const Size& size) {
  std::vector<int64_t> all;
  for (int64_t row = 0; row < size.rows; ++row) {
    const size_t target = target_of(static_cast<size_t>(row), static_cast<size_t>(size.cols));
    all.push_back(static_cast<int64_t>(target));
  }
  return all;
}

// The weight of each class, then their sum, as fp32 has it.
Values with_sum(const Values& weight) {
  Values all = weight;
  double sum = 0;
  for (double w : weight) sum += w;
  if (!weight.empty()) all.push_back(sum);
  return all;
}

// x, dloss, weight -> loss, lse, dx.
template <typename Real>
std::vector<Values> reference(const Size& size, const Numbers& numbers,
                              const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
  const Values &x = inputs[0], &dloss = inputs[1], &weight = inputs[2];
  const Real smoothing = numbers.smoothing, z = numbers.z_loss, cap = numbers.cap;
  const Real scale = numbers.scale, classes = static_cast<Real>(cols);
  const auto w = [&](size_t i) { return weight.empty() ? Real(1) : static_cast<Real>(weight[i]); };
  Values loss(rows), lse(rows), dx(x.size());
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols, true_class = target_of(row, cols);
    if (static_cast<int64_t>(true_class) == numbers.ignore_index) continue;
    const auto s = [&](size_t i) {
      const Real scaled = static_cast<Real>(x[at + i]) * scale;
      return cap > 0 ? cap * std::tanh(scaled / cap) : scaled;
    };
    Real m = s(0);
    for (size_t i = 1; i < cols; ++i) m = std::max(m, s(i));
    const Real sum = total<Real>(0, cols, [&](size_t i) { return std::exp(s(i) - m); });
    const Real l = m + std::log(sum);
    const Real spread = total<Real>(0, cols, [&](size_t i) { return w(i) * (l - s(i)); });
    const Real weights = total<Real>(0, cols, w);
    lse[row] = l;
    loss[row] = (1 - smoothing) * w(true_class) * (l - s(true_class)) +
                smoothing * spread / classes + z * l * l;
    const Real push = (1 - smoothing) * w(true_class) + smoothing * weights / classes + 2 * z * l;
    for (size_t i = 0; i < cols; ++i) {
      Real g = push * (std::exp(s(i) - m) / sum) - smoothing / classes * w(i);
      if (i == true_class) g -= (1 - smoothing) * w(i);
      const Real t = cap > 0 ? s(i) / cap : 0;
      dx[at + i] = static_cast<Real>(dloss[row]) * g * scale * (1 - t * t);
    }
  }
  return {loss, lse, dx, dx};
}

Run run(const Size& size, const Numbers& numbers, const std::vector<Values>& inputs, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const Array x(dtype, inputs[0], rows, stride), dloss(DType::f32, inputs[1]);
  const Array weight(DType::f32, with_sum(inputs[2])), target(targets(size));
  const Array loss(DType::f32, rows), lse(DType::f32, rows), statistics(DType::f32, 3 * rows);
  const Array dx(dtype, rows * cols), written(dtype, inputs[0]);
  const auto [ignored, smoothing, z, cap, scale] = numbers;
  must_succeed(
      cross_entropy_forward(loss.at<float>(), lse.at<float>(), statistics.at<float>(), x.at(),
                            target.at<int64_t>(), weight.at<float>(), rows, rows, cols, 0, stride,
                            ignored, smoothing, z, cap, scale, dtype, nullptr),
      "cross_entropy_forward");
  must_succeed(
      cross_entropy_backward(dx.at(), dloss.at<float>(), nullptr, x.at(), target.at<int64_t>(),
                             weight.at<float>(), statistics.at<float>(), rows, rows, 0, cols, cols,
                             0, stride, 0, cols, ignored, smoothing, z, cap, scale, dtype, nullptr),
      "cross_entropy_backward");
  Run run;
  keep(run, "loss", DType::f32, 1, loss);
  keep(run, "lse", DType::f32, 1, lse);
  keep(run, "dx", dtype, cols, dx);
  must_succeed(
      cross_entropy_in_place(loss.at<float>(), lse.at<float>(), written.at(), dloss.at<float>(),
                             target.at<int64_t>(), weight.at<float>(), rows, rows, cols, 0, cols, 1,
                             ignored, smoothing, z, cap, scale, dtype, nullptr),
      "cross_entropy_in_place");
  keep(run, "written", dtype, cols, written);
  return run;
}

}  // namespace

void cross_entropy() {
  for (bool all : {false, true}) {
    const Numbers& numbers = all ? kAll : kPlain;
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        Values weight = all ? normal(DType::f32, size.cols, 3) : Values();
        for (double& w : weight) w = std::abs(w);
        const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                         normal(DType::f32, size.rows, 2), weight};
        report(
            case_name(all ? "cross_entropy with all" : "cross_entropy", dtype, size),
            [&] { return run(size, numbers, inputs, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, numbers, given)
                            : reference<double>(size, numbers, given);
            },
            inputs);
      }
    }
  }
  must_refuse("cross_entropy of no rows",
              cross_entropy_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 1, 8,
                                    0, 8, 0, 0.f, 0.f, 0.f, 1.f, DType::f32, nullptr));
}

void linear_cross_entropy() {
  for (DType dtype : dtypes()) {
    for (const Size& size : sizes()) {
      const int64_t count = size.rows * size.cols;
      const std::vector<Values> inputs{normal(dtype, count, 1), {0.75}};
      report(
          case_name("linear_cross_entropy", dtype, size),
          [&] {
            const Array x(dtype, inputs[0]), factor(DType::f32, inputs[1]);
            must_succeed(
                linear_cross_entropy_backward(x.at(), factor.at<float>(), count, dtype, nullptr),
                "linear_cross_entropy_backward");
            Run run;
            keep(run, "x", dtype, size.cols, x);
            return run;
          },
          [&](const std::vector<Values>& given, bool) {
            Values product = given[0];
            for (double& value : product) value *= given[1][0];
            return std::vector<Values>{product};
          },
          inputs);
    }
  }
  const Array one(DType::f32, Values{1});
  must_succeed(linear_cross_entropy_backward(nullptr, one.at<float>(), 8, DType::f32, nullptr),
               "linear_cross_entropy_backward by 1, which touches nothing");
  must_refuse("linear_cross_entropy of nothing",
              linear_cross_entropy_backward(nullptr, nullptr, 0, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
