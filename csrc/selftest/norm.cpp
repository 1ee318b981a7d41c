// RMSNorm and LayerNorm, each alone and after an addition.
#include <algorithm>
#include <cmath>

#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kEps = 0.1f;
constexpr float kOffset = 0.5f;  // added to the weight

enum Input { kX, kDy, kWeight, kBias, kResidual, kDsum };

struct Norm {
  bool is_centred, adds;
  Size size;
  DType dtype, weight_dtype, residual_dtype;
  Dropout dropout;  // of the branch, where there is one
  Values kept;
};

// What is normalised, as it is rounded where it is stored.
template <typename Real>
std::vector<Real> normalised(const Norm& norm, const std::vector<Values>& inputs) {
  std::vector<Real> sum(inputs[kX].begin(), inputs[kX].end());
  for (size_t i = 0; norm.adds && i < sum.size(); ++i) {
    sum[i] = sum[i] * static_cast<Real>(norm.kept[i]) + static_cast<Real>(inputs[kResidual][i]);
    if (sizeof(Real) == sizeof(float)) {
      sum[i] = static_cast<Real>(rounded(norm.residual_dtype, sum[i]));
    }
  }
  return sum;
}

// y, rstd, dx, then mean, then sum and dresidual, then dweight, then dbias, as there are.
template <typename Real>
std::vector<Values> reference(const Norm& norm, const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(norm.size.rows), cols = static_cast<size_t>(norm.size.cols);
  const Values &dy = inputs[kDy], &weight = inputs[kWeight], &bias = inputs[kBias];
  const std::vector<Real> sum = normalised<Real>(norm, inputs);
  const auto n = static_cast<Real>(cols);
  Values y(sum.size()), mean(rows), rstd(rows), dx(sum.size()), dresidual(sum.size());
  Values dweight(cols), dbias(cols);
  std::vector<Real> products(sum.size());
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols;
    const auto w = [&](size_t i) {
      return weight.empty() ? Real(1) : Real(weight[i]) + Real(kOffset);
    };
    const auto g = [&](size_t i) { return static_cast<Real>(dy[at + i]) * w(i); };
    const Real m =
        norm.is_centred ? total<Real>(at, cols, [&](size_t i) { return sum[i]; }) / n : 0;
    const auto centred = [&](size_t i) { return sum[at + i] - m; };
    const Real squares = total<Real>(0, cols, [&](size_t i) { return centred(i) * centred(i); });
    const Real r = 1 / std::sqrt(squares / n + static_cast<Real>(kEps));
    const Real mean_g = norm.is_centred ? total<Real>(0, cols, g) / n : 0;
    const Real dot = total<Real>(0, cols, [&](size_t i) { return g(i) * (centred(i) * r); }) / n;
    mean[row] = m;
    rstd[row] = r;
    for (size_t i = 0; i < cols; ++i) {
      const Real xhat = centred(i) * r;
      y[at + i] = xhat * w(i) + (bias.empty() ? Real(0) : Real(bias[i]));
      Real d = r * (g(i) - mean_g - xhat * dot);
      if (norm.adds) d += static_cast<Real>(inputs[kDsum][at + i]);
      dresidual[at + i] = d;
      dx[at + i] = d * static_cast<Real>(norm.kept[at + i]);
      products[at + i] = static_cast<Real>(dy[at + i]) * xhat;
    }
  }
  for (size_t i = 0; i < cols; ++i) {
    dweight[i] = total<Real>(0, rows, [&](size_t row) { return products[row * cols + i]; });
    dbias[i] = total<Real>(0, rows, [&](size_t row) { return Real(dy[row * cols + i]); });
  }
  std::vector<Values> outputs{y, rstd, dx};
  if (norm.is_centred) outputs.push_back(mean);
  if (norm.adds) outputs.insert(outputs.end(), {Values(sum.begin(), sum.end()), dresidual});
  if (!weight.empty()) outputs.push_back(dweight);
  if (!bias.empty()) outputs.push_back(dbias);
  return outputs;
}

Run run(const Norm& norm, const std::vector<Values>& inputs) {
  const DType dtype = norm.dtype, other = norm.weight_dtype, wide = norm.residual_dtype;
  const int64_t rows = norm.size.rows, cols = norm.size.cols, stride = cols + norm.size.gap;
  const int64_t parts = std::min<int64_t>(rows, 4);
  const bool weighted = !inputs[kWeight].empty(), biased = !inputs[kBias].empty();
  const Array x(dtype, inputs[kX], rows, stride), dy(dtype, inputs[kDy], rows, stride);
  const Array weight(other, inputs[kWeight]), bias(other, inputs[kBias]);
  const Array y(dtype, rows * cols), dx(dtype, rows * cols);
  const Array mean(DType::f32, rows), rstd(DType::f32, rows);
  const Array dweight(other, weighted ? cols : 0), dbias(other, biased ? cols : 0);
  const Array weight_parts(DType::f32, weighted ? parts * cols : 0);
  const Array bias_parts(DType::f32, biased ? parts * cols : 0);
  const size_t added = norm.adds ? rows * cols : 0;
  const Array residual(wide, inputs[kResidual]), dsum(wide, inputs[kDsum]);
  const Array sum(wide, added), dresidual(wide, added);
  float *m = mean.at<float>(), *r = rstd.at<float>();
  float *wp = weight_parts.at<float>(), *bp = bias_parts.at<float>();
  const Dropout& dropout = norm.dropout;
  const Array seeds(dropout.seeds), offsets(dropout.offsets);

  // The launchers with a mean and those without, and either with the same arguments.
  if (norm.adds) {
    const auto drop = arguments(dropout, seeds, offsets);
    const auto kinds = std::make_tuple(wide, dtype, other, nullptr);
    const auto forward = [&](auto launcher, auto... statistics) {
      launch("a norm after an addition", launcher,
             std::make_tuple(y.at(), sum.at(), statistics..., x.at(), residual.at(), weight.at(),
                             bias.at(), rows, cols, stride, cols, kEps, weighted ? kOffset : 0.f,
                             false),
             drop, kinds);
    };
    const auto backward = [&](auto launcher, auto... statistics) {
      launch("its gradients", launcher,
             std::make_tuple(dx.at(), dresidual.at(), dweight.at(), dbias.at(), wp, bp, dy.at(),
                             dsum.at(), sum.at(), weight.at(), statistics..., rows, cols, stride,
                             cols, parts, weighted ? kOffset : 0.f),
             drop, kinds);
    };
    norm.is_centred ? forward(add_layer_norm_forward, m, r) : forward(add_rms_norm_forward, r);
    norm.is_centred ? backward(add_layer_norm_backward, m, r) : backward(add_rms_norm_backward, r);
  } else {
    // Rows as [outer, 2, 1, cols], where there are as many.
    const int64_t middle = rows % 2 ? 1 : 2, inner = rows % 2 ? rows : 1;
    const auto forward = [&](auto launcher, auto... statistics) {
      launch("a norm", launcher,
             std::make_tuple(y.at(), statistics..., x.at(), weight.at(), bias.at(), rows, cols,
                             middle, inner, 2 * stride, stride, stride, kEps,
                             weighted ? kOffset : 0.f, false, dtype, other, nullptr));
    };
    const auto backward = [&](auto launcher, auto... statistics) {
      launch(
          "its gradients", launcher,
          std::make_tuple(dx.at(), dweight.at(), dbias.at(), wp, bp, dy.at(), x.at(), weight.at(),
                          statistics..., rows, cols, stride, middle, inner, 2 * stride, stride,
                          stride, parts, weighted ? kOffset : 0.f, dtype, other, nullptr));
    };
    norm.is_centred ? forward(layer_norm_forward, m, r) : forward(rms_norm_forward, r);
    norm.is_centred ? backward(layer_norm_backward, m, r) : backward(rms_norm_backward, r);
  }

  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "rstd", DType::f32, 1, rstd);
  keep(run, "dx", dtype, cols, dx);
  if (norm.is_centred) keep(run, "mean", DType::f32, 1, mean);
  if (norm.adds) keep(run, "sum", wide, cols, sum);
  if (norm.adds) keep(run, "dresidual", wide, cols, dresidual);
  if (weighted) keep(run, "dweight", other, 1, dweight);
  if (biased) keep(run, "dbias", other, 1, dbias);
  return run;
}

void test(const char* name, bool is_centred, bool adds) {
  for (DType dtype : dtypes()) {
    int turn = 0;
    for (const Size& size : sizes()) {
      // Both parameters in fp32, both like x, a weight, none; the sums of wide columns take long.
      const int kind = size.cols > kWideCols ? 3 : turn % 4;
      const DType weight_dtype = kind == 0 ? DType::f32 : dtype;
      const Dropout dropout = dropout_of(adds ? kSeeds[turn / 2 % 4] : Seeds::none, size.rows);
      const Norm norm{is_centred,   adds,
                      size,         dtype,
                      weight_dtype, turn++ % 3 ? dtype : DType::f32,
                      dropout,      factors(dropout, size.rows, size.cols)};
      const int64_t count = size.rows * size.cols;
      std::vector<Values> inputs{normal(dtype, count, 1),
                                 normal(dtype, count, 2),
                                 kind == 3 ? Values() : normal(weight_dtype, size.cols, 3),
                                 kind >= 2 ? Values() : normal(weight_dtype, size.cols, 4),
                                 Values(),
                                 Values()};
      if (adds) inputs[kResidual] = normal(norm.residual_dtype, count, 5);
      if (adds) inputs[kDsum] = normal(norm.residual_dtype, count, 6);
      report(
          case_name(name, dtype, size), [&] { return run(norm, inputs); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? reference<float>(norm, given) : reference<double>(norm, given);
          },
          inputs);
    }
  }
}

}  // namespace

void rms_norm() {
  test("rms_norm", false, false);
  test("add_rms_norm", false, true);
  must_refuse("rms_norm of no rows",
              rms_norm_forward(nullptr, nullptr, nullptr, nullptr, nullptr, 0, 8, 1, 0, 0, 0, 8,
                               kEps, 0, false, DType::f32, DType::f32, nullptr));
}

void layer_norm() {
  test("layer_norm", true, false);
  test("add_layer_norm", true, true);
  must_refuse("layer_norm of no rows",
              layer_norm_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 8, 1, 0,
                                 0, 0, 8, kEps, 0, false, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
