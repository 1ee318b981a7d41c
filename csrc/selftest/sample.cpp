#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>

#include "sample_launchers.h"
#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kSeed = (int64_t{5} << 40) + 7, kOffset = (int64_t{3} << 33) + 3;

// Options with values that are exact in every dtype; `length` of them is none.
struct Options {
  int64_t length = 0, top_k = 0;
  float temperature = 0.75f, top_p = 1, min_p = 0;
  float repetition = 1, presence = 0, frequency = 0;
  bool has_own_seeds = false;
};

bool is_allowed(int64_t col) { return col % 5 != 3; }
double bias_of(int64_t col) { return static_cast<double>(col * 7 % 9) / 4 - 1; }

int64_t wanted_of(const Size& size) { return std::min<int64_t>(size.cols, 5); }

// Of each row some tokens often, others once; padding, and what is no token.
std::vector<int64_t> history_of(const Size& size, const Options& options) {
  std::vector<int64_t> history;
  for (int64_t i = 0; i < size.rows * options.length; ++i) {
    const int64_t token = i * i % (size.cols + 3) - 2;
    history.push_back(i % 3 == 0 ? token / 2 : token);
  }
  return history;
}

// How far the logits of one row are below the largest, over the temperature; -inf where a token is
// cut.
template <typename Real>
std::vector<Real> gaps_of(const Size& size, const Options& options, const Values& x, int64_t row) {
  const auto cols = static_cast<size_t>(size.cols);
  std::vector<Real> logits(cols);
  std::vector<int> counts(cols);
  const std::vector<int64_t> history = history_of(size, options);
  for (int64_t i = row * options.length; i < (row + 1) * options.length; ++i) {
    const int64_t token = history[static_cast<size_t>(i)];
    if (0 <= token && token < size.cols) ++counts[static_cast<size_t>(token)];
  }
  for (size_t j = 0; j < cols; ++j) {
    auto l = static_cast<Real>(x[static_cast<size_t>(row) * cols + j]);
    if (counts[j]) {
      l = l > 0 ? l / Real(options.repetition) : l * Real(options.repetition);
      l -= Real(options.frequency) * Real(counts[j]) + Real(options.presence);
    }
    if (options.length) l += Real(bias_of(static_cast<int64_t>(j)));
    logits[j] = !options.length || is_allowed(static_cast<int64_t>(j)) ? l : Real(-kInfinity);
  }
  std::vector<size_t> ranked(cols);
  std::iota(ranked.begin(), ranked.end(), size_t{0});
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  if (options.top_k) ranked.resize(std::min(cols, static_cast<size_t>(options.top_k)));
  const Real top = logits[ranked[0]];
  const auto gap = [&](size_t j) { return (logits[j] - top) / Real(options.temperature); };
  double all = 0, before = 0;
  for (size_t j : ranked) all += std::exp(static_cast<double>(gap(j)));
  std::vector<Real> gaps(cols, Real(-kInfinity));
  for (size_t j : ranked) {
    const double mass = std::exp(static_cast<double>(gap(j)));
    if (options.top_p < 1 && before >= double{options.top_p} * all) break;
    before += mass;
    if (mass >= double{options.min_p}) gaps[j] = gap(j);
  }
  return gaps;
}

// With noise: the largest is drawn.
template <typename Real>
std::vector<Real> scores_of(const Options& options, std::vector<Real> gaps, int64_t row) {
  const int64_t own = options.has_own_seeds ? row : 0;
  for (size_t j = 0; j < gaps.size(); ++j) {
    if (gaps[j] == Real(-kInfinity)) continue;
    const uint32_t word = word_of(kSeed + own, kOffset - own, options.has_own_seeds ? 0 : row,
                                  static_cast<int64_t>(j));
    gaps[j] += Real(-std::log(-std::log((word + 0.5) / 0x1p32)));
  }
  return gaps;
}

// The score that wins in each row, the logarithm of its token's probability, all probabilities, and
// the largest logits as they were given.
template <typename Real>
std::vector<Values> reference(const Size& size, const Options& options, const Values& x) {
  const auto cols = static_cast<size_t>(size.cols);
  Values scores, logprobs, probabilities, largest;
  for (int64_t row = 0; row < size.rows; ++row) {
    const std::vector<Real> gaps = gaps_of<Real>(size, options, x, row);
    const std::vector<Real> noisy = scores_of<Real>(options, gaps, row);
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
  std::vector<int64_t> seeds, offsets;
  for (int64_t row = 0; options.has_own_seeds && row < rows; ++row) {
    seeds.push_back(kSeed + row);
    offsets.push_back(kOffset - row);
  }
  Values bias;
  for (int64_t col = 0; options.length && col < cols; ++col) bias.push_back(bias_of(col));
  const bool is_adjusted = options.length && !sample_is_held(rows, cols);
  const Array given(dtype, x, rows, stride), history(history_of(size, options));
  const Array biases(DType::f32, bias),
      mask(options.length ? mask_of(size) : std::vector<int32_t>());
  const Array own_seeds(seeds), own_offsets(offsets);
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
  const auto draws = std::make_tuple(own_seeds.at<int64_t>(), own_offsets.at<int64_t>(),
                                     options.has_own_seeds, options.has_own_seeds, kSeed, kOffset);
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
  const std::vector<unsigned char> bits = tokens.bits();
  Values scores;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t token;
    std::memcpy(&token, &bits[static_cast<size_t>(row) * sizeof token], sizeof token);
    const bool is_token = 0 <= token && token < cols;
    const auto noisy = scores_of(options, gaps_of<double>(size, options, x, row), row);
    scores.push_back(is_token ? noisy[static_cast<size_t>(token)] : std::nan(""));
  }
  run.bits = bits;
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
