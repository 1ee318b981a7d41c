// Who works on which row: blockDim.x threads on a row, blockDim.y rows in a block. Either is one
// warp, or one: a short row is a warp's own, and a long one the whole block's.
#pragma once

#include <algorithm>

#include "cuda/vector.cuh"

namespace tilewise {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;  // of a block
constexpr int kMinBlocks = 2;     // on an SM: left to itself ptxas wants more, and spills for it
constexpr int kRowsPerBlock = 4;  // where a warp takes a row
constexpr int kWarpAccesses = 4;  // how many accesses a lane makes before a row is long

// The first row of this thread, and how far it is to its next one.
__device__ inline int64_t first_row() { return blockIdx.x * int64_t{blockDim.y} + threadIdx.y; }
__device__ inline int64_t row_step() { return gridDim.x * int64_t{blockDim.y}; }

// Call body with each column at which this thread moves kWidth elements of a row. Narrow accesses
// are unrolled, to have enough bytes on the way; four at a time would spill on sm_120, and so would
// unrolled wide ones anywhere.
template <int kWidth, typename Body>
__device__ void for_columns(int64_t cols, Body body) {
  constexpr int kUnroll = kWidth == 1 ? 3 : 1;
#pragma unroll kUnroll
  for (int64_t col = threadIdx.x * kWidth; col < cols; col += blockDim.x * kWidth) body(col);
}

inline dim3 threads_for(int64_t cols, int width) {
  const int64_t accesses = (cols + width - 1) / width;
  if (accesses <= kWarpSize * kWarpAccesses) return dim3(kWarpSize, kRowsPerBlock);
  const int64_t warps = (accesses + kWarpSize - 1) / kWarpSize;
  return dim3(static_cast<unsigned>(std::min<int64_t>(warps * kWarpSize, kMaxThreads)));
}

inline int64_t blocks_for(int64_t rows, dim3 threads) { return (rows + threads.y - 1) / threads.y; }

}  // namespace tilewise
