// A row of logits and who works on it: the blocks of a cluster, each on its own slice of columns,
// four at a time, as Philox draws them. A slice is held in shared memory as fp32, so that a row is
// read once from memory; what no cluster can hold, its blocks read again in every pass.
#pragma once

#include "cuda/row_launch.cuh"

namespace tilewise {

constexpr int kGroup = 4;            // columns of an access to a slice
constexpr int kSliceAlignment = 32;  // columns: an access of any dtype, and a word of a mask
constexpr int kRowThreads = 320;     // of a block; two of them have 96 registers a thread
constexpr int kNoColumn = INT32_MAX;
constexpr int64_t kMostColumns = INT32_MAX / 2;

// The columns of whole groups.
__host__ __device__ constexpr int64_t padded(int64_t vocab) {
  return (vocab + kGroup - 1) / kGroup * kGroup;
}

// What the threads of a row found: the largest value, its lowest column, and whether there is NaN.
struct Best {
  float value;
  int column, has_nan;

  __device__ static Best nothing() { return {-INFINITY, kNoColumn, 0}; }
  __device__ bool is_before(const Best& other) const {
    return value > other.value || (value == other.value && column < other.column);
  }
};

__device__ inline Best merge(Best a, Best b) {
  Best best = b.is_before(a) ? b : a;
  best.has_nan = a.has_nan | b.has_nan;
  return best;
}

__device__ inline void consider(Best& best, float v, int column) {
  const Best other{v, column, best.has_nan | (v != v)};
  if (other.is_before(best)) best = other;
  best.has_nan = other.has_nan;
}

// The blocks that share a row.
struct Cluster {
  int blocks, rank;

  __device__ explicit Cluster(int blocks)
      : blocks(blocks), rank(blocks > 1 ? static_cast<int>(cluster_rank()) : 0) {}

  __device__ void sync() const {
    if (blocks == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  template <typename T>
  __device__ T* in_block(T* shared, int block) const {
    return blocks == 1 ? shared : peer(shared, block);
  }
};

// The columns of a block: `size` of them in each, fewer in the last ones.
struct Slice {
  int begin, end;

  __device__ Slice(const Cluster& cluster, int64_t size, int64_t vocab)
      : begin(static_cast<int>(min(cluster.rank * size, vocab))),
        end(static_cast<int>(min(begin + size, vocab))) {}
};

// -0 ties with 0, and has its bits.
__device__ inline float without_sign_of_zero(float v) { return v == 0.f ? 0.f : v; }

// A slice as it lies in memory. `at` is its first column.
template <typename T>
struct Columns {
  const T* at;
  Slice slice;
  int vocab;     // of the row
  bool is_wide;  // whether all its accesses are aligned, and to be had in whole

  __device__ float of(int column) const {
    return without_sign_of_zero(to_float(at[column - slice.begin]));
  }

  // Call body(column, values) for each group of the thread's; behind the row is -inf.
  template <typename Body>
  __device__ void each(Body body) const {
    const int count = slice.end - slice.begin, step = blockDim.x * kGroup;
    for (int j = threadIdx.x * kGroup; j < count; j += step) {
      float v[kGroup];
      if (is_wide) {
        unpack(v, *reinterpret_cast<const Pack<T, kGroup>*>(at + j));
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) v[i] = j + i < count ? to_float(at[j + i]) : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] = without_sign_of_zero(v[i]);
      body(slice.begin + j, v);
    }
  }
};

// Write a slice of the row x at `to`, each access after change(values, its place in the slice), and
// -inf behind it up to a whole group; find the largest. What change makes of -inf behind the slice
// does not count.
template <typename T, typename Change>
__device__ Best write_changed(float* to, const T* x, bool is_wide, const Slice& slice,
                              Change change) {
  constexpr int kWidth = kVector<T>;
  const int count = slice.end - slice.begin;
  Best best = Best::nothing();
  for (int j = threadIdx.x * kWidth; j < count; j += blockDim.x * kWidth) {
    float v[kWidth];
    const int col = slice.begin + j;
    if (is_wide && j + kWidth <= count) {
      unpack(v, read<kWidth>(x + col, true));
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = j + i < count ? to_float(x[col + i]) : -INFINITY;
    }
    change(v, j);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      v[i] = j + i < count ? without_sign_of_zero(v[i]) : -INFINITY;
      if (j + i < count) consider(best, v[i], col + i);
      if (j + i < padded(count)) to[j + i] = v[i];
    }
  }
  return best;
}

// How rows are shared out.
struct Regime {
  Layout layout;
  int64_t slice;  // columns of a block
  bool is_held;

  int64_t shared_bytes() const { return is_held ? slice * int64_t{sizeof(float)} : 0; }
};

constexpr int64_t kReservedBytes = 32 << 10;  // of shared memory, for what is not the slice
constexpr int64_t kPreferredSlice = 20480;    // columns: two blocks fit into a multiprocessor
constexpr int64_t kLeastSlice = 2048;         // columns: less does not pay for a barrier
constexpr int64_t kFewBlocksOfAll = 128;      // as many blocks keep a GPU busy

constexpr int64_t slice_for(int64_t vocab, int blocks) {
  return ceil_divided(ceil_divided(vocab, blocks), kSliceAlignment) * kSliceAlignment;
}

// More blocks a row where a slice would be too long to be held, or the rows too few.
constexpr Regime regime_for(int64_t rows, int64_t vocab, bool has_clusters, int64_t shared) {
  const int64_t capacity = (shared - kReservedBytes) / int64_t{sizeof(float)};
  const int64_t most = std::min(capacity, kPreferredSlice);
  int blocks = 1;
  while (has_clusters && blocks < kMaxTeamBlocks &&
         (slice_for(vocab, blocks) > most ||
          (rows * blocks < kFewBlocksOfAll && slice_for(vocab, 2 * blocks) >= kLeastSlice))) {
    blocks *= 2;
  }
  const int64_t slice = slice_for(vocab, blocks);
  const int64_t warps = ceil_divided(slice, int64_t{kGroup} * kWarpSize);
  const int64_t threads = std::min<int64_t>(warps * kWarpSize, kRowThreads);
  return {{static_cast<int>(threads), 1, blocks, 0}, slice, slice <= capacity};
}

static_assert(regime_for(1, 131072, true, 227 << 10).layout.blocks == 8);
static_assert(regime_for(512, 131072, true, 227 << 10).layout.blocks == 8);
static_assert(regime_for(512, 32000, true, 227 << 10).layout.blocks == 2);
static_assert(regime_for(1, 4099, true, 227 << 10).layout.blocks == 2);
static_assert(regime_for(1, 8200, true, 227 << 10).layout.blocks == 4);
static_assert(regime_for(512, 4099, true, 227 << 10).layout.blocks == 1);
static_assert(regime_for(1, 131072, true, 99 << 10).is_held);   // sm_120
static_assert(regime_for(1, 32000, false, 163 << 10).is_held);  // sm_80
static_assert(!regime_for(1, 131072, false, 163 << 10).is_held);

inline Regime regime_of(int64_t rows, int64_t vocab) {
  const Machine here = machine();
  return regime_for(rows, vocab, here.has_clusters, here.shared_bytes);
}

}  // namespace tilewise
