// The options of a row of logits; and the row with penalties, bias and mask, in fp32.
#pragma once

#include "cuda/sample/columns.cuh"

namespace tilewise {

// As launchers take them: what `each` row has of its own, or null, and what counts for all then.
struct SampleOptions {
  const int64_t* each_top_k;
  const float *temperatures, *top_ps, *min_ps, *repetitions, *presences, *frequencies;
  const int64_t* history;
  int64_t length;  // of the history of a row
  const float* bias;
  int64_t bias_stride;
  const uint32_t* mask;
  int64_t mask_stride;
  int64_t top_k;
  float temperature, top_p, min_p, repetition, presence, frequency;

  bool adjust() const { return history || bias || mask; }

  SampleOptions without_adjustments() const {
    SampleOptions options = *this;
    options.history = nullptr;
    options.bias = nullptr;
    options.mask = nullptr;
    return options;
  }
};

// What is left of a row is cut by these, once its options are known to be in their ranges.
struct Filters {
  float temperature, top_p, min_p;
  int64_t top_k;
  bool can;

  __device__ bool is_greedy() const { return temperature == 0.f || top_k == 1 || top_p == 0.f; }
};

struct Penalties {
  float repetition, presence, frequency;

  // In the order of the reference, each step rounded as there.
  __device__ float of(float v, int count) const {
    v = v > 0.f ? __fdiv_rn(v, repetition) : __fmul_rn(v, repetition);
    v = __fsub_rn(v, __fmul_rn(frequency, static_cast<float>(count)));
    return __fsub_rn(v, presence);
  }
};

// The row's own number, or that for all.
__device__ inline float number_of(const float* each, float all, int64_t row) {
  return each ? each[row] : all;
}

__device__ inline Penalties penalties_of(const SampleOptions& options, int64_t row) {
  return {number_of(options.repetitions, options.repetition, row),
          number_of(options.presences, options.presence, row),
          number_of(options.frequencies, options.frequency, row)};
}

__device__ inline Filters filters_of(const SampleOptions& options, int64_t row) {
  const float t = number_of(options.temperatures, options.temperature, row);
  const float p = number_of(options.top_ps, options.top_p, row);
  const float m = number_of(options.min_ps, options.min_p, row);
  const int64_t k = options.each_top_k ? options.each_top_k[row] : options.top_k;
  const Penalties penalties = penalties_of(options, row);
  const float r = penalties.repetition;
  bool can = t >= 0.f && t < INFINITY && k >= 0 && p >= 0.f && p <= 1.f && m >= 0.f && m <= 1.f;
  can = can && r > 0.f && r < INFINITY && fabsf(penalties.presence) < INFINITY &&
        fabsf(penalties.frequency) < INFINITY;
  return {t, p, m, k, can};
}

// Write a slice of row `row`, adjusted, as write_changed does. The penalised tokens are counted
// where the slice is to be, so that they take no memory of their own, and as much time as there are
// tokens and columns.
template <typename T>
__device__ Best write_slice(float* to, const T* x, bool is_wide, const Slice& slice,
                            const SampleOptions& options, int64_t row) {
  constexpr int kWidth = kVector<T>;
  const int count = slice.end - slice.begin;
  if (options.history) {
    for (int j = threadIdx.x; j < count; j += blockDim.x) to[j] = 0.f;
    __syncthreads();
    const int64_t* history = options.history + row * options.length;
    for (int64_t n = threadIdx.x; n < options.length; n += blockDim.x) {
      const int64_t token = history[n];
      if (token >= slice.begin && token < slice.end) {
        atomicAdd(reinterpret_cast<int*>(to + token - slice.begin), 1);
      }
    }
    __syncthreads();
  }
  const Penalties penalties = penalties_of(options, row);
  const float* bias = options.bias ? options.bias + row * options.bias_stride : nullptr;
  const uint32_t* mask = options.mask ? options.mask + row * options.mask_stride : nullptr;
  return write_changed(to, x, is_wide, slice, [&](auto& v, int j) {
    const int col = slice.begin + j;
    const uint32_t allowed = mask ? mask[col / 32] >> (col % 32) : ~0u;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (j + i >= count) continue;
      const int times = options.history ? __float_as_int(to[j + i]) : 0;
      if (times > 0) v[i] = penalties.of(v[i], times);
      if (bias) v[i] = __fadd_rn(v[i], bias[col + i]);
      if (!(allowed >> i & 1)) v[i] = -INFINITY;
    }
  });
}

// A row of which nothing is written: what was given is what is drawn from.
template <typename T>
__device__ Best largest_of(const Columns<T>& columns) {
  Best best = Best::nothing();
  columns.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) consider(best, v[i], col + i);
  });
  return best;
}

}  // namespace tilewise
