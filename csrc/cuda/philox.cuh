// Philox4x32-10 by logical position: the words that every backend draws. Compiles for the host too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TILEWISE_ANYWHERE __host__ __device__
#else
#define TILEWISE_ANYWHERE
#endif

namespace tilewise {

constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxGroup = 4;  // columns that share one counter

struct PhiloxWords {
  uint32_t at[kPhiloxGroup];
};

// The four words of a group of columns: column / 4, row modulo 2^32, and what the caller chose.
TILEWISE_ANYWHERE inline PhiloxWords philox(uint64_t seed, uint64_t offset, uint32_t row,
                                            uint32_t group) {
  uint32_t a = group, b = row;
  auto c = static_cast<uint32_t>(offset), d = static_cast<uint32_t>(offset >> 32);
  auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__  // the host's compiler does not know it
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t from_a = uint64_t{0xD2511F53} * a, from_c = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(from_c >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(from_c);
    c = static_cast<uint32_t>(from_a >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(from_a);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

// (word + 1/2) / 2^32, rounded once and at most the number before 1: both terms are exact.
TILEWISE_ANYWHERE inline float uniform(uint32_t word) {
  constexpr float kBelowOne = 1.f - 0x1p-24f;
  const float upper = static_cast<float>(word >> 8) * 0x1p-24f;
  const float lower = (static_cast<float>(word & 255) + 0.5f) * 0x1p-32f;
  const float u = upper + lower;
  return u < kBelowOne ? u : kBelowOne;
}

// Whether dropout keeps an element; the threshold is floor(p * 2^32), so 2^32 keeps none.
TILEWISE_ANYWHERE inline bool keep(uint32_t word, uint64_t threshold) { return word >= threshold; }

}  // namespace tilewise
