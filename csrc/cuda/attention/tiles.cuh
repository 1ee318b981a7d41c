// Tiles of rows in shared memory, and what a warp multiplies of them.
#pragma once

#include "cuda/attention/problem.cuh"
#include "cuda/mma.cuh"

namespace tilewise {

constexpr int kTilePad = 8;  // elements: so any eight rows begin in other banks

template <typename T, int kRows, int kDim>
struct Tile {
  static constexpr int kPitch = kDim + kTilePad;
  T at[kRows * kPitch];

  __device__ T* row(int i) { return at + i * kPitch; }
  // Four numbers of a row, in its padding.
  __device__ float4& beside(int i) { return *reinterpret_cast<float4*>(row(i) + kDim); }
};

// Fetch the rows from row0 on of a head of so many rows and columns; what lies outside, and rows
// where `shown` is 0, are zero. A barrier after copy_async_wait makes them seen.
template <bool kWide, typename T, int kRows, int kDim>
__device__ void fetch_rows(Tile<T, kRows, kDim>& to, const T* from, int64_t stride, int row0,
                           int rows, int cols, const uint8_t* shown, int64_t shown_stride) {
  constexpr int kWidth = kWide ? kVector<T> : 1, kAccesses = kDim / kWidth;
  // The greatest power of two of accesses that divides a row's, and the threads.
  constexpr int kBoth = kAccesses | kAttentionThreads, kAcross = kBoth & -kBoth;
  constexpr int kTimes = kAccesses / kAcross, kStep = kAttentionThreads / kAcross;
  static_assert(kRows % kStep == 0);
  const int first = threadIdx.x / kAcross, col = threadIdx.x % kAcross * kWidth;
  const T* source = from + (row0 + first) * stride + col;
  T* place = to.row(first) + col;
#pragma unroll(kWide ? 16 : 1)
  for (int r = 0; r < kRows; r += kStep) {
    const int row = row0 + first + r;
    bool there = row < rows && col < cols;
    if (there && shown) there = shown[row * shown_stride] != 0;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int skipped = i * kAcross * kWidth;
      const bool inside = there && (i == 0 || col + skipped < cols);
      if constexpr (kWide) {
        copy_async<kAccessBytes>(place + skipped, inside ? source + skipped : from,
                                 inside ? kAccessBytes : 0);
      } else {
        place[skipped] = inside ? source[skipped] : from_float<T>(0.f);
      }
    }
    source += kStep * stride;
    place += kStep * Tile<T, kRows, kDim>::kPitch;
  }
}

// The same, by the accesses that the rows allow. kAlwaysWide: they are known to allow the widest.
template <bool kAlwaysWide, typename T, int kRows, int kDim>
__device__ void fetch(Tile<T, kRows, kDim>& to, const T* from, int64_t stride, int row0, int rows,
                      int cols, bool wide, const uint8_t* shown = nullptr,
                      int64_t shown_stride = 0) {
  if (kAlwaysWide || wide) {
    fetch_rows<true>(to, from, stride, row0, rows, cols, shown, shown_stride);
  } else {
    fetch_rows<false>(to, from, stride, row0, rows, cols, shown, shown_stride);
  }
}

// --- Operands, as mma of mma.cuh has them.

// a: 16 rows and 16 columns of a tile, from row and col on.
template <typename T, int kRows, int kDim>
__device__ void load_rows(uint32_t (&a)[4], Tile<T, kRows, kDim>& tile, int row, int col) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices(a, tile.row(row + lane % 16) + col + lane / 16 * 8);
}

// b, twice: 16 rows of a tile are the columns, 16 columns of it from col on the depth.
template <typename T, int kRows, int kDim>
__device__ void load_across(uint32_t (&b)[4], Tile<T, kRows, kDim>& tile, int row, int col) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices(b, tile.row(row + lane / 16 * 8 + lane % 8) + col + lane / 8 % 2 * 8);
}

// b, twice: 16 columns of a tile are the columns, 16 rows of it from row on the depth.
template <typename T, int kRows, int kDim>
__device__ void load_down(uint32_t (&b)[4], Tile<T, kRows, kDim>& tile, int row, int col) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices<true>(b, tile.row(row + lane % 16) + col + lane / 16 * 8);
}

// Sums of 16 kDown rows and 8 kAcross columns, those of a lane.
template <int kDown, int kAcross>
using Fragments = float[kDown][kAcross][4];

template <typename T, int kDown, int kAcross>
__device__ void multiply_pair(Fragments<kDown, kAcross>& d, const uint32_t (&a)[kDown][4],
                              const uint32_t (&b)[4], int pair) {
  const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
#pragma unroll
  for (int m = 0; m < kDown; ++m) {
    mma<T>(d[m][2 * pair], a[m], even);
    mma<T>(d[m][2 * pair + 1], a[m], odd);
  }
}

// d += x y^T: rows of x from row on by all rows of y, of which so many columns are not zero.
// load(a, m, k) is the operand of step k.
template <typename T, int kDown, int kRows, int kDim, typename Load>
__device__ void add_across(Fragments<kDown, kRows / 8>& d, Tile<T, kRows, kDim>& y, Load load,
                           int cols = kDim) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    if (16 * k >= cols) return;
    uint32_t a[kDown][4];
#pragma unroll
    for (int m = 0; m < kDown; ++m) load(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      load_across(b, y, 16 * n, 16 * k);
      multiply_pair<T>(d, a, b, n);
    }
  }
}

// d = x y^T.
template <typename T, int kDown, int kRows, int kDim, typename Load>
__device__ void multiply_across(Fragments<kDown, kRows / 8>& d, Tile<T, kRows, kDim>& y,
                                Load load) {
#pragma unroll
  for (int i = 0; i < kDown * kRows / 2; ++i) d[i / (kRows / 2)][i / 4 % (kRows / 8)][i % 4] = 0.f;
  add_across<T>(d, y, load);
}

// Two neighbours, rounded, the first in the low half.
template <typename T>
__device__ uint32_t rounded_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Sums as an operand: columns 16 k to 16 k + 15, rounded.
template <typename T, int kDown, int kAcross>
__device__ void rounded_operand(uint32_t (&a)[kDown][4], const Fragments<kDown, kAcross>& s,
                                int k) {
#pragma unroll
  for (int m = 0; m < kDown; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&pairs)[4] = s[m][2 * k + i / 2];
      a[m][i] = rounded_pair<T>(pairs[i % 2 * 2], pairs[i % 2 * 2 + 1]);
    }
  }
}

// d += p y: the columns of p by all rows of y.
template <typename T, int kDown, int kRows, int kDim>
__device__ void multiply_down(Fragments<kDown, kDim / 8>& d, const Fragments<kDown, kRows / 8>& p,
                              Tile<T, kRows, kDim>& y) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t a[kDown][4];
    rounded_operand<T>(a, p, k);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      load_down(b, y, 16 * k, 16 * n);
      multiply_pair<T>(d, a, b, n);
    }
  }
}

// Write a warp's sums to rows row0 + row of a head, by way of its rows of a tile that is as wide or
// wider, from row on: only this warp may have use for these.
template <bool kAlwaysWide, typename T, int kDown, int kAcross, int kRows, int kDim>
__device__ void put_rows(T* to, int64_t stride, const Fragments<kDown, kAcross>& d,
                         Tile<T, kRows, kDim>& tile, int row, int row0, int rows, int cols,
                         bool wide) {
  static_assert(8 * kAcross <= kDim);
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kDown * kAcross * 2; ++i) {
    const int m = i / (kAcross * 2), n = i / 2 % kAcross, half = i % 2;
    T* place = tile.row(row + 16 * m + 8 * half + lane / 4) + 8 * n + 2 * (lane % 4);
    const float* pair = &d[m][n][2 * half];
    *reinterpret_cast<uint32_t*>(place) = rounded_pair<T>(pair[0], pair[1]);
  }
  __syncwarp();
  constexpr int kAccesses = 8 * kAcross / kVector<T>;
#pragma unroll 1
  for (int i = lane; i < 16 * kDown * kAccesses; i += kWarpSize) {
    const int r = row + i / kAccesses, col = i % kAccesses * kVector<T>;
    if (row0 + r >= rows || col >= cols) continue;
    const T* from = tile.row(r) + col;
    T* place = to + (row0 + r) * stride + col;
    if (kAlwaysWide || wide) {
      *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int j = 0; j < min(kVector<T>, cols - col); ++j) place[j] = from[j];
    }
  }
}

}  // namespace tilewise
