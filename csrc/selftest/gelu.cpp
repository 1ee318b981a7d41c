// GELU, alone and of x and a bias, with dropout.
#include <algorithm>
#include <cmath>

#include "selftest/activation.h"
#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

Activation activation_of(bool tanh) { return tanh ? Activation::gelu_tanh : Activation::gelu; }

// x, dy -> y, dx.
template <typename Real>
std::vector<Values> reference(bool tanh, const std::vector<Values>& inputs) {
  Values y(inputs[0].size()), dx(inputs[0].size());
  for (size_t i = 0; i < y.size(); ++i) {
    const auto [value, slope] = activate(activation_of(tanh), static_cast<Real>(inputs[0][i]));
    y[i] = value;
    dx[i] = static_cast<Real>(inputs[1][i]) * slope;
  }
  return {y, dx};
}

Run run(const Size& size, bool tanh, const std::vector<Values>& inputs, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols;
  const int64_t x_stride = cols + size.gap, dy_stride = cols + 2 * size.gap;
  const Array x(dtype, inputs[0], rows, x_stride), dy(dtype, inputs[1], rows, dy_stride);
  const Array y(dtype, rows * cols), dx(dtype, rows * cols);
  must_succeed(gelu_forward(y.at(), x.at(), rows, cols, x_stride, tanh, dtype, nullptr),
               "gelu_forward");
  must_succeed(gelu_backward(dx.at(), dy.at(), x.at(), rows, cols, dy_stride, x_stride, tanh, dtype,
                             nullptr),
               "gelu_backward");
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "dx", dtype, cols, dx);
  return run;
}

struct Biased {
  Size size;
  bool tanh;
  Dropout dropout;
  Values kept;
  DType dtype, bias_dtype;
  bool wants_dx, wants_dbias;
};

// x, dy, bias -> y, and of dx and dbias what is wanted.
template <typename Real>
std::vector<Values> reference(const Biased& biased, const std::vector<Values>& inputs) {
  const auto cols = static_cast<size_t>(biased.size.cols);
  const auto rows = static_cast<size_t>(biased.size.rows);
  Values y(rows * cols), dx(rows * cols), dbias(cols);
  std::vector<Real> gradients(rows * cols);
  for (size_t i = 0; i < y.size(); ++i) {
    const Real x = static_cast<Real>(inputs[0][i]) + static_cast<Real>(inputs[2][i % cols]);
    const auto [value, slope] = activate(activation_of(biased.tanh), x);
    const auto kept = static_cast<Real>(biased.kept[i]);
    y[i] = value * kept;
    dx[i] = gradients[i] = static_cast<Real>(inputs[1][i]) * slope * kept;
  }
  for (size_t i = 0; i < cols; ++i) {
    dbias[i] = total<Real>(0, rows, [&](size_t row) { return gradients[row * cols + i]; });
  }
  std::vector<Values> outputs{y};
  if (biased.wants_dx) outputs.push_back(dx);
  if (biased.wants_dbias) outputs.push_back(dbias);
  return outputs;
}

Run run(const Biased& biased, const std::vector<Values>& inputs) {
  const DType dtype = biased.dtype, bias_dtype = biased.bias_dtype;
  const int64_t rows = biased.size.rows, cols = biased.size.cols, gap = biased.size.gap;
  const int64_t x_stride = cols + gap, dy_stride = cols + 2 * gap;
  const int64_t parts = std::min<int64_t>(rows, 3);
  const Array x(dtype, inputs[0], rows, x_stride), dy(dtype, inputs[1], rows, dy_stride);
  const Array bias(bias_dtype, inputs[2]), y(dtype, rows * cols);
  const Array seeds(biased.dropout.seeds), offsets(biased.dropout.offsets);
  const auto drop = arguments(biased.dropout, seeds, offsets);
  const auto kind = std::make_tuple(dtype, bias_dtype, nullptr);
  launch("bias_gelu_forward", bias_gelu_forward,
         std::make_tuple(y.at(), x.at(), bias.at(), rows, cols, x_stride, biased.tanh), drop, kind);
  const Array dx(dtype, biased.wants_dx ? rows * cols : 0);
  const Array dbias(bias_dtype, biased.wants_dbias ? cols : 0);
  const Array dbias_parts(DType::f32, biased.wants_dbias ? parts * cols : 0);
  launch("bias_gelu_backward", bias_gelu_backward,
         std::make_tuple(dx.at(), dbias.at(), dbias_parts.at<float>(), dy.at(), x.at(), bias.at(),
                         rows, cols, dy_stride, x_stride, parts, biased.tanh),
         drop, kind);
  Run run;
  keep(run, "y", dtype, cols, y);
  if (biased.wants_dx) keep(run, "dx", dtype, cols, dx);
  if (biased.wants_dbias) keep(run, "dbias", bias_dtype, 1, dbias);
  return run;
}

void bias_gelu() {
  int turn = 0;
  for (bool tanh : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        const Dropout dropout = dropout_of(kSeeds[turn % 4], size.rows);
        const DType bias_dtype = turn / 4 % 2 ? DType::f32 : dtype;
        const Biased biased{
            size,  tanh,       dropout,       factors(dropout, size.rows, size.cols),
            dtype, bias_dtype, turn % 3 != 0, turn % 3 != 1};
        ++turn;
        const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                         normal(dtype, size.rows * size.cols, 2),
                                         normal(biased.bias_dtype, size.cols, 3)};
        report(
            case_name(tanh ? "bias_gelu tanh" : "bias_gelu", dtype, size),
            [&] { return run(biased, inputs); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(biased, given) : reference<double>(biased, given);
            },
            inputs);
      }
    }
  }
}

}  // namespace

void gelu() {
  for (bool tanh : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        const std::vector<Values> inputs{normal(dtype, size.rows * size.cols, 1),
                                         normal(dtype, size.rows * size.cols, 2)};
        report(
            case_name(tanh ? "gelu tanh" : "gelu", dtype, size),
            [&] { return run(size, tanh, inputs, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(tanh, given) : reference<double>(tanh, given);
            },
            inputs);
      }
    }
  }
  bias_gelu();
  must_refuse("gelu of no rows",
              gelu_forward(nullptr, nullptr, 0, 8, 8, false, DType::f32, nullptr));
  must_refuse("bias_gelu of no rows",
              bias_gelu_forward(nullptr, nullptr, nullptr, 0, 8, 8, false, 0, 1.f, nullptr, nullptr,
                                0, 0, 0, 0, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
