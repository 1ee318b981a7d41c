// Dropout: nothing of the mask is kept, for a number depends on its place alone.
#pragma once

#include "cuda/philox.cuh"
#include "cuda/vector.cuh"

namespace tilewise {

struct Dropout {
  int64_t threshold;  // 0 drops none, 2^32 all
  float scale;        // of what is kept
  const int64_t *seeds, *offsets;
  int64_t seed_stride, offset_stride, seed, offset;
};

// Drop out of the elements of a row at columns from col on, a multiple of four, or of a single one.
template <int kWidth>
__device__ void drop(float (&v)[kWidth], const Dropout& dropout, int64_t row, int64_t col) {
  static_assert(kWidth == 1 || kWidth % kPhiloxGroup == 0);
  if (dropout.threshold == 0) return;
  const auto seed = static_cast<uint64_t>(dropout.seeds ? dropout.seeds[row * dropout.seed_stride]
                                                        : dropout.seed);
  const auto offset = static_cast<uint64_t>(
      dropout.offsets ? dropout.offsets[row * dropout.offset_stride] : dropout.offset);
  const auto counter_row = static_cast<uint32_t>(dropout.seed_stride ? 0 : row);
  const auto threshold = static_cast<uint64_t>(dropout.threshold);
  const auto group = static_cast<uint32_t>(col / kPhiloxGroup);
  if constexpr (kWidth == 1) {
    const PhiloxWords words = philox(seed, offset, counter_row, group);
    const auto place = static_cast<int>(col % kPhiloxGroup);
    const uint32_t low = place == 0 ? words.at[0] : words.at[1];
    const uint32_t high = place == 2 ? words.at[2] : words.at[3];
    v[0] = keep(place < 2 ? low : high, threshold) ? v[0] * dropout.scale : 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += kPhiloxGroup) {
      const PhiloxWords words = philox(seed, offset, counter_row, group + i / kPhiloxGroup);
#pragma unroll
      for (int j = 0; j < kPhiloxGroup; ++j) {
        v[i + j] = keep(words.at[j], threshold) ? v[i + j] * dropout.scale : 0.f;
      }
    }
  }
}

// A thread moves 16 bytes, or where it cannot the elements that share a counter, one by one.
template <bool kWide, typename T>
constexpr int kGroups = kWide ? kVector<T> : kPhiloxGroup;

// The first `left` elements at `from`, by as few accesses as there can be.
template <bool kWide, int kWidth, typename T>
__device__ void read(float (&out)[kWidth], const T* from, int64_t left) {
  if constexpr (kWide) {
    load(out, from);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = i < left ? to_float(from[i]) : 0.f;
  }
}

template <bool kWide, int kWidth, typename T>
__device__ void write(T* to, const float (&values)[kWidth], int64_t left) {
  if constexpr (kWide) {
    store(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < left) to[i] = from_float<T>(values[i]);
    }
  }
}

// Call body with both as constants.
template <typename Body>
cudaError_t for_flags(bool a, bool b, Body body) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (a) return b ? body(Yes{}, Yes{}) : body(Yes{}, No{});
  return b ? body(No{}, Yes{}) : body(No{}, No{});
}

}  // namespace tilewise
