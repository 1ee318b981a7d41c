// What dropout drops, by its definition: Philox4x32-10
// (https://dl.acm.org/doi/10.1145/2063384.2063405) written once more, for the kernels' own is among
// what is tested.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "selftest/array.h"

namespace tilewise::selftest {

// The word of a column, by the definition.
uint32_t word_of(int64_t seed, int64_t offset, int64_t row, int64_t col);

// Where the launchers find the seed and the offset.
enum class Seeds { none, number, array, of_rows };
constexpr Seeds kSeeds[]{Seeds::none, Seeds::number, Seeds::array, Seeds::of_rows};

struct Dropout {
  int64_t threshold = 0;  // of 2^32
  float scale = 1;
  std::vector<int64_t> seeds, offsets;  // one, one a row, or none, and then the numbers
  int64_t stride = 0, seed = 0, offset = 0;
};

// A quarter, unless there are no seeds.
Dropout dropout_of(Seeds kind, int64_t rows);

// What it multiplies the elements of [rows, cols] by.
std::vector<double> factors(const Dropout& dropout, int64_t rows, int64_t cols);

// From the threshold on, as every launcher takes them.
inline auto arguments(const Dropout& dropout, const Array& seeds, const Array& offsets) {
  return std::make_tuple(dropout.threshold, dropout.scale, seeds.at<int64_t>(),
                         offsets.at<int64_t>(), dropout.stride, dropout.stride, dropout.seed,
                         dropout.offset);
}

}  // namespace tilewise::selftest
