// The Gumbel-max rule, with noise only for tokens that can still win.
#pragma once

#include "cuda/philox.cuh"
#include "cuda/sample/ranks.cuh"

namespace tilewise {

// Seeds and offsets as launchers take them: tensors, one a row where their stride is 1, or null,
// and then the numbers.
struct Draws {
  const int64_t *seeds, *offsets;
  int64_t seed_stride, offset_stride, seed, offset;
};

// The noise of a row. With a seed of its own a row does not know its place in the batch.
struct Noise {
  uint64_t seed, offset;
  uint32_t row;
  uint32_t first_group = 0;  // of the columns, where column 0 is

  __device__ Noise(const Draws& draws, int64_t row)
      : seed(draws.seeds ? draws.seeds[row * draws.seed_stride] : draws.seed),
        offset(draws.offsets ? draws.offsets[row * draws.offset_stride] : draws.offset),
        row(draws.seed_stride ? 0 : static_cast<uint32_t>(row)) {}

  __device__ PhiloxWords words(int col) const {
    return philox(seed, offset, row, first_group + static_cast<uint32_t>(col) / kPhiloxGroup);
  }

  __device__ uint32_t word(int col) const {
    const PhiloxWords drawn = words(col);
    const int place = col % kPhiloxGroup;  // no index: registers have none
    const uint32_t low = place & 1 ? drawn.at[1] : drawn.at[0];
    const uint32_t high = place & 1 ? drawn.at[3] : drawn.at[2];
    return place & 2 ? high : low;
  }
};

// -log(-log(uniform)). Near 1 the inner logarithm is that of what is missing, which is exact.
__device__ inline float gumbel(uint32_t word) {
  const float rest = uniform(~word);
  return -logf(rest < 0.5f ? -log1pf(-rest) : -logf(uniform(word)));
}

// A token whose gap to a score has this mass comes above it by no lower word than `lowest_word`,
// for noise above g is as rare as e^-g at most; and by none at all if fewer than half a word do.
constexpr float kWordsOfMass = 0x1p32f * 1.0001f;  // exponentials are rounded
constexpr float kMostWords = 0x1p32f - 1024.f;

__device__ inline uint32_t lowest_word(float words) {
  return words < kMostWords ? 0xfffffffeu - static_cast<uint32_t>(words) : 0;
}

// The token with the largest sum of gap(logit, column) and noise among the thread's own, and the
// best of before. A gap of -inf is never drawn.
template <typename Row, typename Gap>
__device__ Best draw(const Row& row, Best best, const Noise& noise, Gap gap) {
  row.each([&](int col, const float (&v)[kGroup]) {
    float words[kGroup];
    bool can = false;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      words[i] = expf(gap(v[i], col + i) - best.value) * kWordsOfMass;
      can |= words[i] >= 0.5f;
    }
    if (!can) return;
    const PhiloxWords drawn = noise.words(col);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (words[i] >= 0.5f && drawn.at[i] >= lowest_word(words[i])) {
        consider(best, gap(v[i], col + i) + gumbel(drawn.at[i]), col + i);
      }
    }
  });
  return best;
}

// Of the tokens that a cut keeps, the first in rank among them: its gap is none.
template <typename Row>
__device__ Best draw(const Row& row, const Masses& masses, const Best& largest, Cut cut,
                     const Noise& noise) {
  const Best first{gumbel(noise.word(largest.column)), largest.column, 0};
  return draw(row, first, noise, [&](float v, int column) {
    return cut.keeps(v, column) ? masses.gap(v) : -INFINITY;
  });
}

}  // namespace tilewise
