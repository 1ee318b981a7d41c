#include "selftest/dropout.h"

#include <array>

namespace tilewise::selftest {
namespace {

using Words = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

constexpr int64_t kSeed = (int64_t{5} << 40) + 7, kOffset = (int64_t{3} << 33) + 3;

constexpr Words philox(Words counter, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{counter[0]} * 0xD2511F53,
                   odd = uint64_t{counter[2]} * 0xCD9E8D57;
    counter = {static_cast<uint32_t>(odd >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(odd),
               static_cast<uint32_t>(even >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(even)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};  // the golden ratio, and sqrt(3) - 1
  }
  return counter;
}

// Of the digits of pi, as its authors publish it.
constexpr Words kOfPi =
    philox({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, {0xA4093822, 0x299F31D0});
static_assert(kOfPi[0] == 0xD16CFE09 && kOfPi[1] == 0x94FDCCEB && kOfPi[2] == 0x5001E420 &&
              kOfPi[3] == 0x24126EA1);

uint32_t low(int64_t number) { return static_cast<uint32_t>(number); }
uint32_t high(int64_t number) { return static_cast<uint32_t>(static_cast<uint64_t>(number) >> 32); }

}  // namespace

uint32_t word_of(int64_t seed, int64_t offset, int64_t row, int64_t col) {
  const Words words =
      philox({low(col / 4), low(row), low(offset), high(offset)}, {low(seed), high(seed)});
  return words[static_cast<size_t>(col % 4)];
}

Dropout dropout_of(Seeds kind, int64_t rows) {
  if (kind == Seeds::none) return {};
  Dropout dropout{int64_t{1} << 30, 4.f / 3.f, {}, {}, kind == Seeds::of_rows, 0, 0};
  if (kind == Seeds::number) {
    dropout.seed = kSeed;
    dropout.offset = kOffset;
  }
  for (int64_t row = 0; row < (kind == Seeds::of_rows ? rows : 1); ++row) {
    if (kind == Seeds::number) break;
    dropout.seeds.push_back(kSeed + row * row * row);
    dropout.offsets.push_back(kOffset - 5 * row);
  }
  return dropout;
}

std::vector<double> factors(const Dropout& dropout, int64_t rows, int64_t cols) {
  std::vector<double> all;
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<size_t>(dropout.stride ? row : 0);
    const int64_t seed = dropout.seeds.empty() ? dropout.seed : dropout.seeds[at];
    const int64_t offset = dropout.offsets.empty() ? dropout.offset : dropout.offsets[at];
    // A seed of its own does not know which row it is for.
    const uint32_t counted = dropout.stride ? 0 : low(row);
    Words words{};
    for (int64_t col = 0; col < cols; ++col) {
      if (col % 4 == 0) {
        words = philox({low(col / 4), counted, low(offset), high(offset)}, {low(seed), high(seed)});
      }
      const bool kept = words[static_cast<size_t>(col % 4)] >= dropout.threshold;
      all.push_back(kept ? dropout.scale : 0);
    }
  }
  return all;
}

}  // namespace tilewise::selftest
