#include <functional>
#include <tuple>

#include "sample_launchers.h"
#include "selftest/sampling.h"

namespace tilewise::selftest {
namespace {

int64_t wanted_of(const Size& size) { return std::min<int64_t>(size.cols, 5); }

// With noise: the largest is drawn.
template <typename Real>
std::vector<Real> scores_of(const Places& places, std::vector<Real> gaps, int64_t row) {
  for (size_t j = 0; j < gaps.size(); ++j) {
    if (gaps[j] == Real(-kInfinity)) continue;
    gaps[j] += places.noise<Real>(row, 0, static_cast<int64_t>(j));
  }
  return gaps;
}

// The score that wins in each row, the logarithm of its token's probability, all probabilities, and
// the largest logits as they were given.
template <typename Real>
std::vector<Values> reference(const Size& size, const Options& options, const Values& x) {
  const auto cols = static_cast<size_t>(size.cols);
  const Places places(size.rows, options.has_own_seeds);
  Values scores, logprobs, probabilities, largest;
  for (int64_t row = 0; row < size.rows; ++row) {
    const std::vector<Real> gaps = gaps_of<Real>(size, options, x, row);
    const std::vector<Real> noisy = scores_of<Real>(places, gaps, row);
    const auto best = std::max_element(noisy.begin(), noisy.end());
    const Real sum = total<Real>(0, cols, [&](size_t j) { return std::exp(gaps[j]); });
    scores.push_back(static_cast<double>(*best));
    logprobs.push_back(
        static_cast<double>(gaps[static_cast<size_t>(best - noisy.begin())] - std::log(sum)));
    for (Real gap : gaps) probabilities.push_back(static_cast<double>(std::exp(gap) / sum));
    Values given(x.begin() + row * size.cols, x.begin() + (row + 1) * size.cols);
    std::sort(given.begin(), given.end(), std::greater<double>());
    largest.insert(largest.end(), given.begin(), given.begin() + wanted_of(size));
  }
  return {scores, logprobs, probabilities, largest};
}

std::vector<int32_t> mask_of(const Size& size) {
  const int64_t words = (size.cols + 31) / 32;
  std::vector<int32_t> mask(static_cast<size_t>(size.rows * words));
  for (int64_t row = 0; row < size.rows; ++row) {
    for (int64_t col = 0; col < size.cols; ++col) {
      int32_t& word = mask[static_cast<size_t>(row * words + col / 32)];
      if (is_allowed(col))
        word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << col % 32);
    }
  }
  return mask;
}

// Draw, and give the score that each drawn token has by the definition: which of two that are as
// near as rounding was drawn is not said.
Run run(const Size& size, const Options& options, const Values& x, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const Places places(rows, options.has_own_seeds);
  Values bias;
  for (int64_t col = 0; options.length && col < cols; ++col) bias.push_back(bias_of(col));
  const bool is_adjusted = options.length && !sample_is_held(rows, cols);
  const Array given(dtype, x, rows, stride), history(history_of(size, options));
  const Array biases(DType::f32, bias),
      mask(options.length ? mask_of(size) : std::vector<int32_t>());
  const Array own_seeds(places.seeds), own_offsets(places.offsets);
  const Array room(DType::f32, is_adjusted ? rows * ((cols + 3) / 4 * 4) : 0);
  const Array tokens(std::vector<int64_t>(static_cast<size_t>(rows), -7));
  const void* x_at = given.at();
  if (is_adjusted) {
    must_succeed(sample_adjust(room.at<float>(), given.at(), rows, cols, stride, nullptr, nullptr,
                               nullptr, history.at<int64_t>(), options.length, biases.at<float>(),
                               0, mask.at<int32_t>(), (cols + 31) / 32, options.repetition,
                               options.presence, options.frequency, dtype, nullptr),
                 "sample_adjust");
    x_at = room.at();
  }
  const auto unless_adjusted = [&](auto* pointer) { return is_adjusted ? nullptr : pointer; };
  const auto logits = std::make_tuple(x_at, rows, cols, is_adjusted ? (cols + 3) / 4 * 4 : stride);
  const float* none = nullptr;
  const auto filters = std::make_tuple(
      nullptr, none, none, none, none, none, none, unless_adjusted(history.at<int64_t>()),
      options.length, unless_adjusted(biases.at<float>()), int64_t{0},
      unless_adjusted(mask.at<int32_t>()), (cols + 31) / 32, options.top_k, options.temperature,
      options.top_p, options.min_p, options.repetition, options.presence, options.frequency);
  const auto draws = arguments(places, own_seeds, own_offsets);
  const auto last = std::make_tuple(is_adjusted ? DType::f32 : dtype, nullptr);
  must_succeed(std::apply(sample_forward, std::tuple_cat(std::make_tuple(tokens.at<int64_t>()),
                                                         logits, filters, draws, last)),
               "sample_forward");
  const int64_t wanted = wanted_of(size), room_stride = 8;
  const Array logprobs(DType::f32, rows), likeliest(DType::f32, rows * wanted);
  const Array probabilities(DType::f32, rows * cols), largest(dtype, rows * wanted);
  const Array first(std::vector<int64_t>(static_cast<size_t>(rows * wanted)));
  const Array ranked(std::vector<int64_t>(static_cast<size_t>(rows * room_stride)));
  must_succeed(
      std::apply(sample_logprobs,
                 std::tuple_cat(std::make_tuple(logprobs.at<float>(), likeliest.at<float>(),
                                                first.at<int64_t>(), ranked.at<int64_t>(),
                                                tokens.at<int64_t>()),
                                logits, std::make_tuple(wanted, room_stride, true), filters, last)),
      "sample_logprobs");
  must_succeed(
      std::apply(sample_filter, std::tuple_cat(std::make_tuple(nullptr, probabilities.at<float>()),
                                               logits, filters, last)),
      "sample_filter");
  must_succeed(sample_top_k(largest.at(), first.at<int64_t>(), ranked.at<int64_t>(), given.at(),
                            rows, cols, stride, wanted, room_stride, dtype, nullptr),
               "sample_top_k");
  Run run;
  Values scores;
  const std::vector<int64_t> drawn = integers(tokens);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = drawn[static_cast<size_t>(row)];
    const bool is_token = 0 <= token && token < cols;
    const auto noisy = scores_of(places, gaps_of<double>(size, options, x, row), row);
    scores.push_back(is_token ? noisy[static_cast<size_t>(token)] : std::nan(""));
  }
  run.bits = tokens.bits();
  run.outputs.push_back({"tokens", DType::f32, 1, scores});
  keep(run, "logprobs", DType::f32, 1, logprobs);
  keep(run, "probabilities", DType::f32, cols, probabilities);
  keep(run, "largest", dtype, wanted, largest);
  return run;
}

}  // namespace

void sample() {
  for (bool all : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        Options options;
        if (all) {
          options = {size.cols / 4 + 3,
                     size.cols / 2 + 1,
                     1.5f,
                     0.875f,
                     0.0625f,
                     1.25f,
                     0.25f,
                     0.125f,
                     true};
        }
        const Values x = normal(dtype, size.rows * size.cols, 1);
        report(
            case_name("sample", dtype, size) + (all ? " filtered" : ""),
            [&] { return run(size, options, x, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, options, given[0])
                            : reference<double>(size, options, given[0]);
            },
            {x});
      }
    }
  }
  const int64_t* none = nullptr;
  must_refuse("sample of no rows",
              sample_forward(nullptr, nullptr, 0, 8, 8, none, nullptr, nullptr, nullptr, nullptr,
                             nullptr, nullptr, none, 0, nullptr, 0, nullptr, 0, 0, 1, 1, 0, 1, 0, 0,
                             none, none, 0, 0, 0, 0, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
