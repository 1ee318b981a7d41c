#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

// x and y: alike, a branch narrower than the residual, and a gradient of such a branch.
const std::pair<DType, DType> kPairs[]{{DType::f32, DType::f32},   {DType::f16, DType::f16},
                                       {DType::bf16, DType::bf16}, {DType::f16, DType::f32},
                                       {DType::bf16, DType::f32},  {DType::f32, DType::f16},
                                       {DType::f32, DType::bf16}};

// x, residual -> y.
template <typename Real>
std::vector<Values> reference(const Values& kept, const std::vector<Values>& inputs) {
  Values y(inputs[0].size());
  for (size_t i = 0; i < y.size(); ++i) {
    const Real residual = inputs[1].empty() ? Real(0) : static_cast<Real>(inputs[1][i]);
    y[i] = static_cast<Real>(inputs[0][i]) * static_cast<Real>(kept[i]) + residual;
  }
  return {y};
}

Run run(const Size& size, const Dropout& dropout, const std::vector<Values>& inputs, DType dtype,
        DType y_dtype) {
  const int64_t rows = size.rows, cols = size.cols;
  const int64_t x_stride = cols + size.gap, residual_stride = cols + 2 * size.gap;
  const Array x(dtype, inputs[0], rows, x_stride), y(y_dtype, rows * cols);
  const Array residual(y_dtype, inputs[1], rows, residual_stride);
  const Array seeds(dropout.seeds), offsets(dropout.offsets);
  launch("dropout_add_forward", dropout_add_forward,
         std::make_tuple(y.at(), x.at(), residual.at(), rows, cols, x_stride, residual_stride),
         arguments(dropout, seeds, offsets), std::make_tuple(dtype, y_dtype, nullptr));
  Run run;
  keep(run, "y", y_dtype, cols, y);
  return run;
}

}  // namespace

void dropout_add() {
  int turn = 0;
  for (const auto& pair : kPairs) {
    const DType dtype = pair.first, y_dtype = pair.second;
    for (const Size& size : sizes()) {
      for (Seeds kind : kSeeds) {
        const int64_t count = size.rows * size.cols;
        const Dropout dropout = dropout_of(kind, size.rows);
        const Values kept = factors(dropout, size.rows, size.cols);
        const std::vector<Values> inputs{normal(dtype, count, 1),
                                         normal(y_dtype, turn++ % 5 ? count : 0, 2)};
        const std::string name = std::string("dropout_add to ") + name_of(y_dtype);
        report(
            case_name(name.c_str(), dtype, size),
            [&] { return run(size, dropout, inputs, dtype, y_dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(kept, given) : reference<double>(kept, given);
            },
            inputs);
      }
    }
  }
  must_refuse("dropout_add of no rows",
              dropout_add_forward(nullptr, nullptr, nullptr, 0, 8, 8, 8, 0, 1.f, nullptr, nullptr,
                                  0, 0, 0, 0, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
