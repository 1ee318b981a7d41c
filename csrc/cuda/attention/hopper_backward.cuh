// What the two kernels of the backward pass on Hopper have in common. In each a warp produces: it
// has the copy engine fill rings of tiles; and each of two consumers, a warpgroup, has 64 rows of
// what the block keeps: its sums, a tile's scores and their gradients never leave registers.
//
// A block has one item of work, and the GPU gives blocks to whatever multiprocessor is free, the
// longest first. A persistent grid would save the beginning of an item, small beside all queries or
// all keys of a head, and would have to know beforehand how long each takes.
#pragma once

#include "cuda/attention/backward.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace tilewise {

constexpr int kBackwardConsumers = 2, kBackwardRows = kBackwardConsumers * kGroupRows;
constexpr int kBackwardThreads = kWarpgroup * (1 + kBackwardConsumers);
constexpr int kBackwardStages = 3;  // of a ring: a tile whose end is read, one begun, one to come
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// The n-th tile of the other side: as in the forward pass, those that are not seen whole are first.
__device__ inline int turn_of(const Reach& reach, int n) { return reach.at(reach.count() - 1 - n); }
__device__ inline int partial(const Reach& reach) { return reach.count() - reach.whole(); }

// --- Products, on their way when these return.

// d = x y^T: 64 rows of x, from `row` on, by all rows of y.
template <typename T, int kOfX, int kOfY, int kDim>
__device__ __forceinline__ void start_across(float (&d)[kOfY / 2], const Panels<T, kOfX, kDim>& x,
                                             int row, const Panels<T, kOfY, kDim>& y) {
  const uint64_t a = x.across(row), b = y.across(0);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    wgmma<T>(d, advance(a, x.step(i)), advance(b, y.step(i)), i > 0);
  }
  wgmma_commit();
}

// d += p y: the columns of p by all rows of y.
template <typename T, int kOfY, int kDim>
__device__ __forceinline__ void start_down(float (&d)[kDim / 2],
                                           const uint32_t (&p)[kOfY / kStepRows][4],
                                           const Panels<T, kOfY, kDim>& y) {
  const uint64_t b = y.down();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kOfY / kStepRows; ++i) {
    wgmma<T, Major::mn>(d, p[i], advance(b, i * kStepRows * kRowBytes), true);
  }
  wgmma_commit();
}

// Sums as an operand, rounded.
template <typename T, int kSums>
__device__ __forceinline__ void round_sums(uint32_t (&p)[kSums / 8][4], const float (&s)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums / 2; ++i) {
    p[i / 4][i % 4] = rounded_pair<T>(s[2 * i], s[2 * i + 1]);
  }
}

// --- The way out.

// Put a consumer's sums where the copy engine finds them: the rows from `row` on, which nobody else
// has any use for.
template <typename T, int kRows, int kDim>
__device__ void stage(Panels<T, kRows, kDim>& to, int row, const float (&sums)[kDim / 2],
                      float scale) {
  const int thread = threadIdx.x % kWarpgroup;
  const int own = row + thread / kWarpSize * 16 + thread % kWarpSize / 4;
#pragma unroll
  for (int i = 0; i < kDim / 4; ++i) {
    const int col = i / 2 * 8 + thread % 4 * 2;
    const uint32_t offset = (own + i % 2 * 8) * kRowBytes + col % kPanelCols * sizeof(T);
    auto* panel = reinterpret_cast<uint8_t*>(to.at[col / kPanelCols]);
    *reinterpret_cast<uint32_t*>(panel + swizzled(offset, Swizzle::bytes128)) =
        rounded_pair<T>(sums[2 * i] * scale, sums[2 * i + 1] * scale);
  }
}

// Let the copy engine write 64 staged rows; those past the end of a head it leaves out.
template <typename T, int kRows, int kDim>
__device__ void store(const CUtensorMap& map, const Panels<T, kRows, kDim>& from, int row, int to,
                      int head, int batch) {
#pragma unroll
  for (int i = 0; i < kDim / kPanelCols; ++i) {
    tensor_store(map, from.at[i] + row * kPanelCols, {i * kPanelCols, to, head, batch});
  }
}

// --- Of launches.

// Whether the kernels of Hopper take this, but for its strides; and on this GPU.
template <typename T>
bool is_for_hopper(const Attention<T>& a) {
  const Sizes& size = a.size;
  return size.dim == size.v_dim && (size.dim == 64 || size.dim == 128) && !is_scored(a) &&
         has_map(a.q, size.batch, size.heads, size.seq_q) &&
         has_map(a.k, size.batch, size.kv_heads, size.seq_k) &&
         has_map(a.v, size.batch, size.kv_heads, size.seq_k) &&
         attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

}  // namespace tilewise
