// Rows of logits as launchers are given them, and as kernels then have them.
#pragma once

#include "cuda/sample/ranks.cuh"

namespace tilewise {

template <typename T>
struct Logits {
  const T* x;
  int64_t vocab, x_stride;
  SampleOptions options;
  int64_t slice;
  int blocks;    // of a row
  bool is_wide;  // whether accesses to x are aligned; and, of rows that are not held, whole
};

// What a block works on: its slice in shared memory, as write(to, x, slice) has it, or where it was
// given. `best` is the largest logit of the thread's.
template <bool kHeld, typename T, typename Write>
__device__ auto columns_of(const Logits<T>& logits, const Cluster& cluster, int64_t row, Best& best,
                           Write write) {
  const int vocab = static_cast<int>(logits.vocab);
  const T* x = logits.x + row * logits.x_stride;
  const Slice slice(cluster, logits.slice, logits.vocab);
  if constexpr (kHeld) {
    float* held = dynamic_shared();
    best = write(held, x, slice);
    __syncthreads();
    return Columns<float>{held, slice, vocab, true};
  } else {
    const Columns<T> columns{x + slice.begin, slice, vocab, logits.is_wide};
    best = largest_of(columns);
    return columns;
  }
}

// The same of logits, adjusted.
template <bool kHeld, typename T>
__device__ auto columns_of(const Logits<T>& logits, const Cluster& cluster, int64_t row,
                           Best& best) {
  return columns_of<kHeld>(logits, cluster, row, best,
                           [&](float* to, const T* x, const Slice& slice) {
                             return write_slice(to, x, logits.is_wide, slice, logits.options, row);
                           });
}

// Call body(logits, regime, is_held) with their C++ type. Rows that are not held come adjusted.
template <typename Body>
cudaError_t for_logits(const void* x, int64_t rows, int64_t vocab, int64_t x_stride,
                       const SampleOptions& options, DType dtype, Body body) {
  const Regime regime = regime_of(rows, vocab);
  if (vocab > kMostColumns || (!regime.is_held && options.adjust())) return cudaErrorInvalidValue;
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool is_aligned = can_vectorise<kVector<T>>(addresses(x), x_stride);
    const Logits<T> logits{static_cast<const T*>(x),
                           vocab,
                           x_stride,
                           options,
                           regime.slice,
                           regime.layout.blocks,
                           is_aligned && (regime.is_held || vocab % kGroup == 0)};
    return regime.is_held ? body(logits, regime, std::true_type{})
                          : body(logits, regime, std::false_type{});
  });
}

}  // namespace tilewise
