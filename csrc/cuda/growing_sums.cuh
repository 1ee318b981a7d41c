// Sums over rows where rows are gone through column by column (rows.cuh), not held: each part's
// grow in shared memory or where they are written, and parts.cuh adds the parts.
#pragma once

#include "cuda/cluster_launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/rows.cuh"

namespace tilewise {

constexpr int64_t kMaxSharedBytes = 96 * 1024;  // what a block can have from sm_80 on

// Where the sums of a part are kept while they grow: shared memory, unless they are too wide.
// A thread owns the same columns of every row, so they need no barrier.
__device__ inline float* growing_sums(float* parts, int64_t part, int64_t cols, bool in_shared,
                                      int array = 0) {
  const int64_t before = array * int64_t{blockDim.y} + threadIdx.y;
  return in_shared ? dynamic_shared() + before * cols : parts + part * cols;
}

template <int kWidth>
__device__ void clear(float* sums, int64_t cols) {
  for_columns<kWidth>(cols, [&](int64_t col) {
    *reinterpret_cast<Pack<float, kWidth>*>(sums + col) = Pack<float, kWidth>{};
  });
}

template <int kWidth>
__device__ void add(float* sums, const float (&values)[kWidth]) {
  float v[kWidth];
  load(v, sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] += values[i];
  *reinterpret_cast<Pack<float, kWidth>*>(sums) = packed<float>(v);
}

template <int kWidth>
__device__ void copy(float* to, const float* from, int64_t cols) {
  for_columns<kWidth>(cols, [&](int64_t col) {
    float v[kWidth];
    load(v, from + col);
    store(to + col, v);
  });
}

// Launch a kernel whose last argument says whether its sums fit into shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_parts(void (*kernel)(Parameters...), int arrays, int64_t parts, int64_t cols,
                         dim3 threads, cudaStream_t stream, Arguments... arguments) {
  int64_t shared = arrays * int64_t{threads.y} * cols * int64_t{sizeof(float)};
  const bool in_shared = shared <= kMaxSharedBytes;
  if (!in_shared) shared = 0;
  const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (status != cudaSuccess) return status;
  return launch(kernel, blocks_for(parts, threads), threads, shared, stream, arguments...,
                in_shared);
}

}  // namespace tilewise
