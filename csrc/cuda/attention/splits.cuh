// The keys of a head in splits, which are by their positions alone, and what puts together what
// was summed of each, in their order.
#pragma once

#include "cuda/attention/cache.cuh"
#include "cuda/attention/tiles.cuh"

namespace tilewise {
namespace {

constexpr int kSplit = static_cast<int>(kDecodeSplit);
constexpr int kMergeWarps = 4, kWidest = 256;

template <typename T>
struct Decode {
  Heads<const T> q, k, v;  // batch of k and v: the page
  Cache cache;
  const int32_t* lengths;
  const float* slopes;
  int64_t slopes_batch, slopes_head;
  float* work;  // of each row and split the highest score and the sum; then what is summed
  int batch, heads, kv_heads, seq_q, dim, v_dim, splits, left;
  float softcap, scale;
  bool wide;

  __device__ int group() const { return heads / kv_heads; }
  __device__ int length(int b) const {
    return static_cast<int>(min(max(int64_t{lengths[b]}, int64_t{0}), cache.capacity));
  }
  // The first key that the first query, and so any, sees.
  __device__ int first_key(int length) const {
    return left < 0 ? 0 : max(length - seq_q - left, 0);
  }
  // Where the results of a row, of the heads of all batches, and of a split are.
  __device__ float* statistics(int64_t row, int split) const {
    return work + 2 * (row * splits + split);
  }
  __device__ float* sums(int64_t row, int split) const {
    const int64_t rows = static_cast<int64_t>(batch) * heads * seq_q;
    return work + 2 * rows * splits + (row * splits + split) * v_dim;
  }
};
// One row of one head: the splits in the order of their warps, and the sink.
template <typename T>
__global__ void __launch_bounds__(kMergeWarps * kWarpSize)
    merge_kernel(const Decode<T> d, Heads<T> out, float* lse, const void* sinks,
                 bool sinks_single) {
  TILEWISE_SHARED(tops, float[kMergeWarps]);
  TILEWISE_SHARED(totals, float[kMergeWarps]);
  TILEWISE_SHARED(parts, float[kMergeWarps][kWidest]);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t row = blockIdx.x;
  const int query = static_cast<int>(row % d.seq_q);
  const int head = static_cast<int>(row / d.seq_q % d.heads);
  const int batch = static_cast<int>(row / d.seq_q / d.heads), length = d.length(batch);
  const int first = d.first_key(length) / kSplit, last = (length + kSplit - 1) / kSplit;
  float sink = -INFINITY;
  if (sinks) {
    sink = kLog2E * (sinks_single ? static_cast<const float*>(sinks)[head]
                                  : to_float(static_cast<const T*>(sinks)[head]));
  }
  float top = sink;
  for (int split = first + threadIdx.x; split < last; split += kMergeWarps * kWarpSize) {
    top = fmaxf(top, d.statistics(row, split)[0]);
  }
#pragma unroll
  for (int i = kWarpSize / 2; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, i));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  for (int w = 0; w < kMergeWarps; ++w) top = fmaxf(top, tops[w]);
  const float base = top == -INFINITY ? 0.f : top;

  float sums[kWidest / kWarpSize] = {}, total = 0.f;
#pragma unroll 2
  for (int split = first - first % kMergeWarps + warp; split < last; split += kMergeWarps) {
    if (split < first) continue;
    const float* statistics = d.statistics(row, split);
    const float* from = d.sums(row, split);
    const float weight = exp2_approximate(statistics[0] - base);
    total += weight * statistics[1];
#pragma unroll
    for (int i = 0; i < kWidest / kWarpSize; ++i) {
      const int col = lane + i * kWarpSize;
      if (col < d.v_dim) sums[i] += weight * from[col];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidest / kWarpSize; ++i) parts[warp][lane + i * kWarpSize] = sums[i];
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  total = exp2_approximate(sink - base);
  for (int w = 0; w < kMergeWarps; ++w) total += totals[w];
  const float share = total == 0.f ? 0.f : 1.f / total;
  T* to = out.of(batch, head) + query * out.row;
  for (int col = threadIdx.x; col < d.v_dim; col += kMergeWarps * kWarpSize) {
    float sum = parts[0][col];
    for (int w = 1; w < kMergeWarps; ++w) sum += parts[w][col];
    to[col] = from_float<T>(sum * share);
  }
  constexpr float kLn2 = 0.693147180559945309f;
  if (threadIdx.x == 0) lse[row] = total == 0.f ? -INFINITY : kLn2 * top + logf(total);
}

}  // namespace
}  // namespace tilewise
