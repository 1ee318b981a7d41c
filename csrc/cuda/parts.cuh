// Sums over rows, for the gradients of weights, without atomics: whoever works on rows sums them
// into a part of its own, and the parts are then added in a fixed order.
#pragma once

#include "cuda/launch.cuh"
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
  const float zeros[kWidth] = {};
  for_columns<kWidth>(cols, [&](int64_t col) { store(sums + col, zeros); });
}

template <int kWidth>
__device__ void add(float* sums, const float (&values)[kWidth]) {
  float v[kWidth];
  load(v, sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] += values[i];
  store(sums, v);
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
  constexpr int64_t kNeedsNoLeave = 48 * 1024;
  if (shared > kNeedsNoLeave) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  return launch(kernel, blocks_for(parts, threads), threads, shared, stream, arguments...,
                in_shared);
}

constexpr int kColumnThreads = 16;

// out[col] = sum over row of parts[row, col]. Blocks of (32, 16): 32 columns, 16 threads on each.
template <typename T>
__global__ void column_sum_kernel(T* out, const float* parts, int64_t rows, int64_t cols) {
  TILEWISE_SHARED(sums, float[kColumnThreads][kWarpSize]);
  const int64_t col = blockIdx.x * int64_t{kWarpSize} + threadIdx.x;

  float sum = 0.f;
  for (int64_t row = threadIdx.y; row < rows && col < cols; row += kColumnThreads) {
    sum += parts[row * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();

  if (threadIdx.y == 0 && col < cols) {
    for (int y = 1; y < kColumnThreads; ++y) sum += sums[y][threadIdx.x];
    out[col] = from_float<T>(sum);
  }
}

template <typename T>
cudaError_t column_sum(T* out, const float* parts, int64_t rows, int64_t cols,
                       cudaStream_t stream) {
  const int64_t blocks = (cols + kWarpSize - 1) / kWarpSize;
  return launch(column_sum_kernel<T>, blocks, dim3(kWarpSize, kColumnThreads), 0, stream, out,
                parts, rows, cols);
}

}  // namespace tilewise
