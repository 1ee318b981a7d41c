// The first of a row in rank: cut off, listed as they come, and then sorted.
#pragma once

#include "cuda/sample/ranks.cuh"

namespace tilewise {

constexpr int kListed = 2048;  // what fits into the memory of the bins is sorted there

// In order of rank: by logit, the largest first, then by column.
__device__ inline uint64_t place_of(float v, int column) {
  return uint64_t{~ordered(v)} << 32 | static_cast<uint32_t>(column);
}

// List those that a cut keeps, in no order.
template <typename Row>
__device__ int list(uint64_t* listed, const Cluster& cluster, Bins& bins, const Row& row, Cut cut) {
  Amount mine{}, all;
  row.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      mine.count += col + i < row.slice.end && cut.keeps(v[i], col + i);
    }
  });
  uint64_t at = sum_until(cluster, bins, mine, all).count - mine.count;
  row.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i < row.slice.end && cut.keeps(v[i], col + i)) {
        listed[at++] = place_of(v[i], col + i);
      }
    }
  });
  return static_cast<int>(all.count);
}

// Sort, by one block; `size` is a power of two, at least the count.
__device__ inline void sort(uint64_t* listed, int count, int size) {
  for (int n = count + threadIdx.x; n < size; n += blockDim.x) listed[n] = kNever;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int apart = width / 2; apart > 0; apart /= 2) {
      for (int n = threadIdx.x; n < size / 2; n += blockDim.x) {
        const int a = n / apart * apart * 2 + n % apart, b = a + apart;
        const uint64_t left = listed[a], right = listed[b];
        if ((left > right) == ((a & width) == 0)) {
          listed[a] = right;
          listed[b] = left;
        }
      }
      __syncthreads();
    }
  }
}

// The first `count` of the row in rank, sorted, or fewer that are kept. Only the first block of the
// row has them, and nobody else is to go on. Returns where they are, and how many.
template <typename Row>
__device__ uint64_t* first_in_rank(const Cluster& cluster, Bins& bins, const Row& row, float top,
                                   Cut cut, int64_t wanted, uint64_t* room, int& count) {
  if (wanted < row.vocab) {
    const Cut first = cut_at(cluster, bins, row, {top, 1.f}, wanted, false);
    if (first.key > cut.key || (first.key == cut.key && first.stop < cut.stop)) cut = first;
  }
  count = list(room, cluster, bins, row, cut);
  cluster.sync();
  if (cluster.rank > 0) return nullptr;
  int size = 1;
  while (size < count) size *= 2;
  uint64_t* listed = room;
  if (size <= kListed) {
    listed = reinterpret_cast<uint64_t*>(bins.low);
    for (int n = threadIdx.x; n < count; n += blockDim.x) listed[n] = room[n];
  }
  sort(listed, count, size);
  return listed;
}

}  // namespace tilewise
