// How the elements of [rows, cols] arrays are shared out: a thread makes one access, and a block
// takes blockDim.y rows of blockDim.x accesses.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace tilewise {

constexpr int kElementThreads = 256;  // of a block

struct Elements {
  int64_t rows, cols;
  int64_t across;  // blocks side by side in a row
  int64_t tiles;   // blocks in all
  dim3 threads;
};

// Such that no more threads than needed are beside a short row.
inline Elements elements_of(int64_t rows, int64_t cols, int width) {
  const int64_t accesses = (cols + width - 1) / width;
  unsigned x = 1;
  while (x < kElementThreads && x < accesses) x *= 2;
  const dim3 threads(x, kElementThreads / x);
  const int64_t across = (accesses + x - 1) / x;
  return {rows, cols, across, across * ((rows + threads.y - 1) / threads.y), threads};
}

// The quotient; 64-bit division is a hundred instructions, and grids are rarely that large.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if (b == 1) return a;
  if (a <= UINT32_MAX && b <= UINT32_MAX) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  return a / b;
}

// Call body with the row and the first column of each access of this thread.
template <int kWidth, typename Body>
__device__ void for_elements(const Elements& elements, Body body) {
  for (int64_t tile = blockIdx.x; tile < elements.tiles; tile += gridDim.x) {
    const int64_t down = divide(tile, elements.across);
    const int64_t row = down * blockDim.y + threadIdx.y;
    const int64_t access = (tile - down * elements.across) * blockDim.x + threadIdx.x;
    if (row < elements.rows && access * kWidth < elements.cols) body(row, access * kWidth);
  }
}

// Call run(width, begin, rows, cols) to launch a kernel on `cols` columns from column `begin` on,
// by accesses of kVector<T> elements where that is possible and of one where it is not. Rows that
// lie one after the other in all arrays are one long row: of that, only the end may be narrow.
template <typename T, typename Run, typename... Strides>
cudaError_t launch_elements(int64_t rows, int64_t cols, uintptr_t addresses, Run run,
                            Strides... strides) {
  constexpr int kWide = kVector<T>;
  if (rows == 1 || ((strides == cols) && ...)) {
    cols *= rows, rows = 1;
    const int64_t wide = addresses % kAccessBytes == 0 ? cols / kWide * kWide : 0;
    if (wide > 0) {
      const cudaError_t status = run(std::integral_constant<int, kWide>{}, 0, rows, wide);
      if (status != cudaSuccess || wide == cols) return status;
    }
    return run(std::integral_constant<int, 1>{}, wide, rows, cols - wide);
  }
  if (can_vectorise<kWide>(addresses, cols, strides...)) {
    return run(std::integral_constant<int, kWide>{}, 0, rows, cols);
  }
  return run(std::integral_constant<int, 1>{}, 0, rows, cols);
}

}  // namespace tilewise
