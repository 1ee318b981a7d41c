// What the tests of sampling share: filtered logits and noise by their definitions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kSeed = (int64_t{5} << 40) + 7, kOffset = (int64_t{3} << 33) + 3;

// Options with values that are exact in every dtype; `length` of them is none.
struct Options {
  int64_t length = 0, top_k = 0;
  float temperature = 0.75f, top_p = 1, min_p = 0;
  float repetition = 1, presence = 0, frequency = 0;
  bool has_own_seeds = false;
};

inline bool is_allowed(int64_t col) { return col % 5 != 3; }
inline double bias_of(int64_t col) { return static_cast<double>(col * 7 % 9) / 4 - 1; }

// Of each row some tokens often, others once; padding, and what is no token.
inline std::vector<int64_t> history_of(const Size& size, const Options& options) {
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

// The noise of a column.
template <typename Real>
Real noise_of(int64_t seed, int64_t offset, int64_t row, int64_t col) {
  const double uniform = (word_of(seed, offset, row, col) + 0.5) / 0x1p32;
  return static_cast<Real>(-std::log(-std::log(uniform)));
}

// Seeds and offsets as launchers take them: for all rows, or each its own.
struct Places {
  std::vector<int64_t> seeds, offsets;

  Places(int64_t rows, bool has_own) {
    for (int64_t row = 0; has_own && row < rows; ++row) {
      seeds.push_back(kSeed + row);
      offsets.push_back(kOffset - row);
    }
  }

  // Of a row, `ahead` of its offset.
  template <typename Real>
  Real noise(int64_t row, int64_t ahead, int64_t col) const {
    const auto own = seeds.empty() ? 0 : row;
    return noise_of<Real>(kSeed + own, kOffset - own + ahead, seeds.empty() ? row : 0, col);
  }
};

inline auto arguments(const Places& places, const Array& seeds, const Array& offsets) {
  const bool has_own = !places.seeds.empty();
  return std::make_tuple(seeds.at<int64_t>(), offsets.at<int64_t>(), has_own, has_own, kSeed,
                         kOffset);
}

// What integers a launcher wrote.
inline std::vector<int64_t> integers(const Array& array) {
  const std::vector<unsigned char> bits = array.bits();
  std::vector<int64_t> numbers(bits.size() / sizeof(int64_t));
  std::memcpy(numbers.data(), bits.data(), bits.size());
  return numbers;
}

}  // namespace tilewise::selftest
