// What becomes of scores before their softmax: a cap, a bias, a mask, and none from the future.
#pragma once

#include "cuda/span.cuh"

namespace tilewise {

// Of a [batch, heads, queries, cols], in elements: 0 along what is broadcast, and of cols 0 or 1.
struct Strides {
  int64_t batch, head, query, col;
};

// Which row of a [batch, heads, queries, cols] a row is. There are fewer than 2^32 of them.
struct Position {
  uint32_t batch, head, query;

  __device__ Position(int64_t row, int heads, int queries)
      : batch(static_cast<uint32_t>(row) / queries / heads),
        head(static_cast<uint32_t>(row) / queries % heads),
        query(static_cast<uint32_t>(row) % queries) {}

  __device__ int64_t start(const Strides& strides) const {
    return batch * strides.batch + head * strides.head + query * strides.query;
  }
};

// What hides columns, of all rows. The mask may be null.
struct Hiding {
  const uint8_t* mask;
  Strides strides;
  int heads, queries;
  bool causal;
};

// The same of one row.
class Shown {
 public:
  __device__ Shown(const Hiding& hiding, const Position& position, int64_t cols)
      : mask_(hiding.mask ? hiding.mask + position.start(hiding.strides) : nullptr),
        along_(hiding.strides.col != 0),
        seen_(hiding.causal ? position.query + 1 + cols - hiding.queries : cols) {}

  // How many columns are not in the future; below 1 if all are.
  __device__ int64_t seen() const { return seen_; }

  // Bit i: whether column col + i is shown. `wide`: the mask can be read kWidth bytes at a time.
  // Columns outside of the row, before 0 and from `cols` on, are not read.
  template <int kWidth>
  __device__ uint32_t bits(int64_t col, int64_t cols, bool wide) const {
    uint32_t bits = 0;
    if (!mask_ || !along_) {
      bits = !mask_ || *mask_ ? ~0u : 0u;
    } else if (wide) {
      const auto pack = *reinterpret_cast<const Pack<uint8_t, kWidth>*>(mask_ + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) bits |= (pack.at[i] ? 1u : 0u) << i;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (col + i >= 0 && col + i < cols) bits |= (mask_[col + i] ? 1u : 0u) << i;
      }
    }
    const int64_t left = seen_ - col;
    if (left < kWidth) bits &= left > 0 ? (1u << left) - 1u : 0u;
    return bits;
  }

 private:
  const uint8_t* mask_;
  bool along_;
  int64_t seen_;
};

// The cap on a score that comes near it, and how much less it grows there.
__device__ inline float capped(float s, float cap) { return cap * tanhf(s / cap); }
__device__ inline float capped_slope(float s, float cap) {
  const float t = tanhf(s / cap);
  return 1.f - t * t;
}

}  // namespace tilewise
