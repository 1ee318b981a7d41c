#include <algorithm>
#include <cmath>

#include "selftest/activation.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

struct Unit {
  const char* name;
  Activation activation;
  float limit, alpha, up_offset;
};

const Unit kUnits[]{{"glu silu", Activation::silu, INFINITY, 1.f, 0.f},
                    {"glu gelu", Activation::gelu, INFINITY, 1.f, 0.f},
                    {"glu gelu_tanh", Activation::gelu_tanh, INFINITY, 1.f, 0.f},
                    {"glu relu", Activation::relu, INFINITY, 1.f, 0.f},
                    {"glu sigmoid", Activation::sigmoid, INFINITY, 1.f, 0.f},
                    {"glu with all", Activation::silu, 1.f, 1.702f, 0.75f}};

// gate, up, dy -> y, the gradients side by side, and each alone.
template <typename Real>
std::vector<Values> reference(const Size& size, const Unit& unit,
                              const std::vector<Values>& inputs) {
  const auto cols = static_cast<size_t>(size.cols);
  const Real limit = unit.limit, alpha = unit.alpha, up_offset = unit.up_offset;
  const size_t count = inputs[0].size();
  Values y(count), dgate(count), dup(count), both(2 * count);
  for (size_t i = 0; i < count; ++i) {
    const auto gate = static_cast<Real>(inputs[0][i]), up = static_cast<Real>(inputs[1][i]);
    const auto dy = static_cast<Real>(inputs[2][i]);
    const auto [value, slope] = activate(unit.activation, alpha * std::min(gate, limit));
    const Real times = std::max(std::min(up, limit), -limit) + up_offset;
    y[i] = value / alpha * times;
    dgate[i] = gate <= limit ? dy * times * slope : Real(0);
    dup[i] = std::abs(up) <= limit ? dy * (value / alpha) : Real(0);
    both[i / cols * 2 * cols + i % cols] = dgate[i];
    both[i / cols * 2 * cols + cols + i % cols] = dup[i];
  }
  return {y, both, dgate, dup};
}

Run run(const Size& size, const Unit& unit, const std::vector<Values>& inputs, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols;
  const int64_t gate_stride = cols + size.gap, up_stride = cols + 2 * size.gap;
  const int64_t dy_stride = cols + 3 * size.gap;
  const Array gate(dtype, inputs[0], rows, gate_stride), up(dtype, inputs[1], rows, up_stride);
  const Array dy(dtype, inputs[2], rows, dy_stride);
  const Array y(dtype, rows * cols), both(dtype, 2 * rows * cols);
  const Array dgate(dtype, rows * cols), dup(dtype, rows * cols);
  must_succeed(glu_forward(y.at(), gate.at(), up.at(), rows, cols, gate_stride, up_stride,
                           unit.activation, unit.limit, unit.alpha, unit.up_offset, dtype, nullptr),
               "glu_forward");
  const auto backward = [&](void* to_gate, void* to_up, int64_t dgate_stride, int64_t dup_stride) {
    must_succeed(glu_backward(to_gate, to_up, dy.at(), gate.at(), up.at(), rows, cols, dgate_stride,
                              dup_stride, dy_stride, gate_stride, up_stride, unit.activation,
                              unit.limit, unit.alpha, unit.up_offset, dtype, nullptr),
                 "glu_backward");
  };
  backward(both.at(), both.at<char>() + static_cast<size_t>(cols) * bytes_of(dtype), 2 * cols,
           2 * cols);
  const int64_t nowhere = size.gap ? 2 * cols : cols;  // of what is null
  backward(dgate.at(), nullptr, cols, nowhere);
  backward(nullptr, dup.at(), nowhere, cols);
  Run run;
  keep(run, "y", dtype, cols, y);
  keep(run, "dgate and dup", dtype, 2 * cols, both);
  keep(run, "dgate", dtype, cols, dgate);
  keep(run, "dup", dtype, cols, dup);
  return run;
}

}  // namespace

void glu() {
  for (const Unit& unit : kUnits) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        std::vector<Values> inputs;
        for (int i = 0; i < 3; ++i) inputs.push_back(normal(dtype, size.rows * size.cols, i + 1));
        report(
            case_name(unit.name, dtype, size), [&] { return run(size, unit, inputs, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, unit, given)
                            : reference<double>(size, unit, given);
            },
            inputs);
      }
    }
  }
  must_refuse("glu of no rows", glu_forward(nullptr, nullptr, nullptr, 0, 8, 8, 8, Activation::silu,
                                            1.f, 1.f, 0.f, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
