#include "sample_launchers.h"
#include "selftest/sampling.h"

namespace tilewise::selftest {
namespace {

constexpr float kTemperature = 0.75f;

// [rows, vocab] logits from [rows, dim] and [vocab, dim]; with noise, over the temperature.
template <typename Real>
std::vector<Real> scores_of(const Size& size, int64_t dim, const Places& places,
                            const std::vector<Values>& given, int64_t row) {
  const double *hidden = &given[0][static_cast<size_t>(row * dim)], *weight = given[1].data();
  std::vector<Real> scores;
  for (int64_t j = 0; j < size.cols; ++j) {
    auto sum = static_cast<Real>(given[2].empty() ? 0 : given[2][static_cast<size_t>(j)]);
    for (int64_t k = 0; k < dim; ++k) {
      sum += static_cast<Real>(hidden[k]) * static_cast<Real>(weight[j * dim + k]);
    }
    scores.push_back(sum / Real(kTemperature) + places.noise<Real>(row, 0, j));
  }
  return scores;
}

template <typename Real>
std::vector<Values> reference(const Size& size, int64_t dim, const Places& places,
                              const std::vector<Values>& given) {
  Values best;
  for (int64_t row = 0; row < size.rows; ++row) {
    const std::vector<Real> scores = scores_of<Real>(size, dim, places, given, row);
    best.push_back(static_cast<double>(*std::max_element(scores.begin(), scores.end())));
  }
  return {best};
}

// As of sample: the scores, by the definition, of what was drawn.
Run run(const Size& size, int64_t dim, const Places& places, const std::vector<Values>& given,
        DType dtype) {
  const int64_t rows = size.rows, vocab = size.cols, stride = dim + size.gap;
  const int64_t tiles = (vocab + kTileTokens - 1) / kTileTokens;
  const Array hidden(dtype, given[0], rows, stride), weight(dtype, given[1], vocab, stride);
  const Array bias(dtype, given[2]), seeds(places.seeds), offsets(places.offsets);
  const Array tokens(std::vector<int64_t>(static_cast<size_t>(rows), -7));
  const Array floats(DType::f32, 2 * rows * tiles), columns(DType::f32, 2 * rows * tiles);
  launch("sample_linear", sample_linear,
         std::make_tuple(tokens.at<int64_t>(), floats.at<float>(), columns.at<int32_t>(),
                         hidden.at(), weight.at(), bias.at(), rows, vocab, dim, stride, stride,
                         nullptr, kTemperature),
         arguments(places, seeds, offsets), std::make_tuple(dtype, nullptr));
  Run run;
  Values found;
  const std::vector<int64_t> drawn = integers(tokens);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = drawn[static_cast<size_t>(row)];
    const bool is_token = 0 <= token && token < vocab;
    const auto scores = scores_of<double>(size, dim, places, given, row);
    found.push_back(is_token ? scores[static_cast<size_t>(token)] : std::nan(""));
  }
  run.bits = tokens.bits();
  run.outputs.push_back({"tokens", DType::f32, 1, found});
  return run;
}

}  // namespace

// The columns of the sizes are tokens.
void linear_sample() {
  for (bool has_bias : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        const int64_t dim = size.cols > kWideCols ? 8 : has_bias ? 136 : 33;
        const Places places(size.rows, has_bias);
        const std::vector<Values> given{normal(dtype, size.rows * dim, 1),
                                        normal(dtype, size.cols * dim, 2),
                                        normal(dtype, has_bias ? size.cols : 0, 3)};
        report(
            case_name("linear_sample", dtype, size) + (has_bias ? " bias" : ""),
            [&] { return run(size, dim, places, given, dtype); },
            [&](const std::vector<Values>& inputs, bool single) {
              return single ? reference<float>(size, dim, places, inputs)
                            : reference<double>(size, dim, places, inputs);
            },
            given);
      }
    }
  }
  must_refuse("linear_sample of no rows",
              sample_linear(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 8, 8, 8, 8,
                            nullptr, 1, nullptr, nullptr, 0, 0, 0, 0, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
