// A few new queries against a cache. The keys of a head are split by their positions alone, and a
// block takes one split for up to 16 rows: queries of all heads that share these keys. Each of its
// warps has 16 of the keys at a time, and a ring of tiles of its own in which keys and values
// arrive in turn. What the warps, and then the splits, have summed is put together in their order
// (Flash-Decoding, Dao et al., 2023; pages as in https://arxiv.org/abs/2309.06180).
#include "cuda/attention/splits.cuh"

namespace tilewise {
namespace {

constexpr int kRows = 16;  // of a tile: queries of a block, keys of a warp

// How many warps a block has, and tiles a ring. Shared bytes of a block, for heads of 32, 64, 128,
// 192 and 256: 29440, 50944, 93952, 72704 and 95232.
template <int kDim>
struct Shape {
  static constexpr int kWarps = kDim <= 128 ? 4 : 2, kThreads = kWarps * kWarpSize;
  static constexpr int kStep = kRows * kWarps;  // keys of all warps
  static constexpr int kTiles = 5;
};

template <typename T, int kDim>
struct Shared {
  static constexpr int kWarps = Shape<kDim>::kWarps;
  using Rows = Tile<T, kRows, kDim>;
  Rows q;
  Slot slots[kSplit];
  float highest[kWarps][kRows], total[kWarps][kRows];
  union {
    Rows ring[kWarps][Shape<kDim>::kTiles];
    float sums[kWarps][kRows][kDim + kTilePad];  // when nobody needs the ring any more
  };
};

// Which rows a block has, of which head's keys, and which split of these.
struct Item {
  int batch, kv_head, split, row0;

  template <typename T>
  __device__ Item(const Decode<T>& d, int tiles) {
    unsigned rest = blockIdx.x;
    row0 = static_cast<int>(rest % tiles) * kRows, rest /= tiles;
    kv_head = static_cast<int>(rest % d.kv_heads), rest /= d.kv_heads;
    split = static_cast<int>(rest % d.splits);
    batch = static_cast<int>(rest / d.splits);
  }
};

// 16 rows by the lanes of a warp, or by those of the block; locate(row) is where one begins, null
// for a row of zeros. A barrier after copy_async_wait makes them seen.
template <bool kWide, typename T, int kDim, typename Locate>
__device__ void gather_each(Tile<T, kRows, kDim>& to, const T* other, int cols, int thread,
                            int threads, Locate locate) {
  constexpr int kWidth = kWide ? kVector<T> : 1, kAccesses = kDim / kWidth;
#pragma unroll(kWide ? 16 : 1)
  for (int i = thread; i < kRows * kAccesses; i += threads) {
    const int row = i / kAccesses, col = i % kAccesses * kWidth;
    const T* from = locate(row);
    const bool there = from && col < cols;
    T* place = to.row(row) + col;
    if constexpr (kWide) {
      copy_async<kAccessBytes>(place, there ? from + col : other, there ? kAccessBytes : 0);
    } else {
      *place = there ? from[col] : from_float<T>(0.f);
    }
  }
}

template <typename T, int kDim, typename Locate>
__device__ void gather(Tile<T, kRows, kDim>& to, const T* other, int cols, bool wide, int thread,
                       int threads, Locate locate) {
  if (wide) {
    gather_each<true>(to, other, cols, thread, threads, locate);
  } else {
    gather_each<false>(to, other, cols, thread, threads, locate);
  }
}

template <typename T, int kDim>
__device__ void fetch_queries(Tile<T, kRows, kDim>& to, const Decode<T>& d, const Item& item) {
  const int group = d.group(), rows = group * d.seq_q;
  gather(to, d.q.at, d.dim, d.wide, threadIdx.x, Shape<kDim>::kThreads, [&](int row) -> const T* {
    const int r = item.row0 + row;
    if (r >= rows) return nullptr;
    return d.q.of(item.batch, item.kv_head * group + r / d.seq_q) + r % d.seq_q * d.q.row;
  });
  copy_async_commit();
}

// What a warp does: its keys, for all rows of the block.
template <typename T, int kDim>
struct Work {
  static constexpr int kWarps = Shape<kDim>::kWarps;

  const Decode<T>& d;
  Shared<T, kDim>& shared;
  const int warp, lane;
  int own[2];  // places of this lane's two queries among the keys
  float slope[2];
  Fragments<1, kDim / 8> sums = {};
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {};

  __device__ Work(const Decode<T>& d, Shared<T, kDim>& shared, const Item& item, int length)
      : d(d), shared(shared), warp(threadIdx.x / kWarpSize), lane(threadIdx.x % kWarpSize) {
    const int rows = d.group() * d.seq_q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(item.row0 + lane / 4 + 8 * i, rows - 1);
      const int head = item.kv_head * d.group() + row / d.seq_q;
      own[i] = length - d.seq_q + row % d.seq_q;
      slope[i] = d.slopes ? d.slopes[item.batch * d.slopes_batch + head * d.slopes_head] : 0.f;
    }
  }

  // Products to scores; `first`: the position of the first key, whose slot is at `slots`.
  __device__ void score(Fragments<1, 2>& s, int first, const Slot* slots) const {
    const float inner = d.softcap == 0.f ? d.scale : d.scale / d.softcap;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4, e = i % 4, col = 8 * n + 2 * (lane % 4) + e % 2, key = first + col;
      const int place = own[e / 2];
      float x = s[0][n][e] * inner;
      if (d.softcap != 0.f) x = d.softcap * tanhf(x);
      x -= slope[e / 2] * static_cast<float>(abs(place - key));
      const bool hidden = key > place || (d.left >= 0 && key < place - d.left);
      s[0][n][e] = hidden || slots[col].page < 0 ? -INFINITY : x;
    }
  }

  // Scores to powers of two, of which those of before are rescaled.
  __device__ void accumulate(Fragments<1, 2>& s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int half = 2 * i;
      float above = highest[i];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        above = fmaxf(above, fmaxf(s[0][n][half], s[0][n][half + 1]));
      }
      above = fmaxf(above, __shfl_xor_sync(0xffffffff, above, 1));
      above = fmaxf(above, __shfl_xor_sync(0xffffffff, above, 2));
      const float base = above == -INFINITY ? 0.f : above * kLog2E;
      const float rescale = exp2_approximate(highest[i] * kLog2E - base);
      highest[i] = above;
      total[i] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = half; e < half + 2; ++e) {
          s[0][n][e] = exp2_approximate(s[0][n][e] * kLog2E - base);
          total[i] += s[0][n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        sums[0][n][half] *= rescale;
        sums[0][n][half + 1] *= rescale;
      }
    }
  }

  // Put together what the warps have summed, in their order, and write it.
  __device__ void end(const Item& item) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
      highest[i] *= kLog2E;
      if (lane % 4 == 0) {
        shared.highest[warp][lane / 4 + 8 * i] = highest[i];
        shared.total[warp][lane / 4 + 8 * i] = total[i];
      }
    }
    __syncthreads();  // and nobody reads the ring any more
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      const float weight = share(top_of(row), highest[i]);
      float* place = shared.sums[warp][row] + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        place[8 * n] = sums[0][n][2 * i] * weight;
        place[8 * n + 1] = sums[0][n][2 * i + 1] * weight;
      }
    }
    __syncthreads();
    write(item);
  }

 private:
  // The highest score of all warps.
  __device__ float top_of(int row) const {
    float top = shared.highest[0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, shared.highest[w][row]);
    return top;
  }

  __device__ static float share(float top, float highest) {
    return highest == -INFINITY ? 0.f : exp2_approximate(highest - top);
  }

  __device__ void write(const Item& item) const {
    const int rows = d.group() * d.seq_q - item.row0;
    const int64_t before =
        (static_cast<int64_t>(item.batch) * d.heads + item.kv_head * d.group()) * d.seq_q;
    for (int row = warp; row < min(rows, kRows); row += kWarps) {
      const int64_t place = before + item.row0 + row;
      float* to = d.sums(place, item.split);
      for (int col = lane; col < d.v_dim; col += kWarpSize) {
        float sum = shared.sums[0][row][col];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += shared.sums[w][row][col];
        to[col] = sum;
      }
      if (lane) continue;
      const float top = top_of(row);
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += share(top, shared.highest[w][row]) * shared.total[w][row];
      }
      float* statistics = d.statistics(place, item.split);
      statistics[0] = top, statistics[1] = sum;
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads)
    decode_kernel(const Decode<T> d, int tiles) {
  constexpr int kStep = Shape<kDim>::kStep, kTiles = Shape<kDim>::kTiles;
  constexpr int kThreads = Shape<kDim>::kThreads;
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(dynamic_shared());
  const Item item(d, tiles);
  const int length = d.length(item.batch), start = item.split * kSplit;
  const int begin = max(start, d.first_key(length)), end = min(start + kSplit, length);
  if (begin >= end) return;
  for (int i = threadIdx.x; i < kSplit; i += kThreads) {
    const int key = start + i;
    shared.slots[i] = key >= begin && key < end ? d.cache.of(item.batch, key) : Slot{-1, 0};
  }
  Work<T, kDim> work(d, shared, item, length);
  const int first = (begin - start) / kStep, last = (end - start + kStep - 1) / kStep;
  const int count = 2 * (last - first);  // keys and values in turn
  auto& ring = shared.ring[work.warp];
  const auto at = [&](int n) { return (first + n / 2) * kStep + kRows * work.warp; };
  const auto stream = [&](int n) {
    if (n < count) {
      const bool keys = n % 2 == 0;
      const T* head = keys ? d.k.of(0, item.kv_head) : d.v.of(0, item.kv_head);
      const int64_t page = keys ? d.k.batch : d.v.batch, token = keys ? d.k.row : d.v.row;
      const Slot* slots = shared.slots + at(n);
      gather(ring[n % kTiles], head, keys ? d.dim : d.v_dim, d.wide, work.lane, kWarpSize,
             [&](int row) -> const T* {
               const Slot slot = slots[row];
               if (slot.page < 0) return nullptr;
               return head + slot.page * page + slot.token * token;
             });
    }
    copy_async_commit();
  };

  fetch_queries(shared.q, d, item);
  __syncthreads();  // the slots are there
#pragma unroll 1
  for (int n = 0; n < kTiles - 1; ++n) stream(n);
  copy_async_wait<kTiles - 1>();
  __syncthreads();  // the queries are there
  const auto arrive = [&](int n) {
    copy_async_wait<kTiles - 2>();
    __syncwarp();  // the tile is there, and no lane reads the one before it any more
    stream(n + kTiles - 1);
  };
#pragma unroll 1
  for (int n = 0; n < count; n += 2) {
    arrive(n);
    Fragments<1, 2> s;
    multiply_across<T>(s, ring[n % kTiles],
                       [&](uint32_t(&a)[4], int, int k) { load_rows(a, shared.q, 0, 16 * k); });
    work.score(s, start + at(n), shared.slots + at(n));
    work.accumulate(s);
    arrive(n + 1);
    multiply_down<T>(work.sums, s, ring[(n + 1) % kTiles]);
  }
  work.end(item);
}

// Call body with the width that heads are padded to, as a constant.
template <typename Body>
cudaError_t for_decode_width(int64_t wider, Body body) {
  if (wider <= 32) return body(std::integral_constant<int, 32>{});
  if (wider <= 64) return body(std::integral_constant<int, 64>{});
  if (wider <= 128) return body(std::integral_constant<int, 128>{});
  if (wider <= 192) return body(std::integral_constant<int, 192>{});
  if (wider <= kWidest) return body(std::integral_constant<int, kWidest>{});
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_decode(const Decode<T>& d, const Heads<T>& out, float* lse, const void* sinks,
                          bool sinks_single, cudaStream_t stream) {
  const int64_t heads = int64_t{d.batch} * d.kv_heads;
  const int64_t shared_rows = int64_t{d.heads} / d.kv_heads * d.seq_q;
  const int64_t rows = heads * shared_rows, tiles = tiles_of(shared_rows, kRows);
  if (rows > INT32_MAX || heads * tiles > INT32_MAX / d.splits) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t status = for_decode_width(std::max(d.dim, d.v_dim), [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    return launch_clusters(decode_kernel<T, kDim>, heads * tiles * d.splits, 1,
                           Shape<kDim>::kThreads, sizeof(Shared<T, kDim>), stream, d,
                           static_cast<int>(tiles));
  });
  if (status != cudaSuccess) return status;
  return launch(merge_kernel<T>, rows, kMergeWarps * kWarpSize, 0, stream, d, out, lse, sinks,
                sinks_single);
}

}  // namespace

cudaError_t attention_decode_forward(
    void* out, float* lse, float* work, const void* q, const void* k, const void* v,
    const int32_t* lengths, const int32_t* table, const float* slopes, const void* sinks,
    int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq_q, int64_t dim, int64_t v_dim,
    int64_t capacity, int64_t page_size, int64_t pages, int64_t out_batch, int64_t out_head,
    int64_t out_row, int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_page, int64_t k_head,
    int64_t k_row, int64_t v_page, int64_t v_head, int64_t v_row, int64_t table_row,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, float softcap, float scale,
    DType dtype, DType sinks_dtype, cudaStream_t stream) {
  Sizes size;
  if (!are_like(dtype, dtype, sinks_dtype) || page_size <= 0 ||
      !sizes_of(size, batch, heads, kv_heads, seq_q, capacity, dim, v_dim)) {
    return cudaErrorInvalidValue;
  }
  const bool wide = can_vectorise<8>(addresses(q, k, v), dim, v_dim, q_batch, q_head, q_row, k_page,
                                     k_head, k_row, v_page, v_head, v_row);
  return for_half(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Decode<T> d{{static_cast<const T*>(q), q_batch, q_head, q_row},
                      {static_cast<const T*>(k), k_page, k_head, k_row},
                      {static_cast<const T*>(v), v_page, v_head, v_row},
                      {table, table_row, page_size, pages, capacity},
                      lengths,
                      slopes,
                      slopes_batch,
                      slopes_head,
                      work,
                      size.batch,
                      size.heads,
                      size.kv_heads,
                      size.seq_q,
                      size.dim,
                      size.v_dim,
                      static_cast<int>(tiles_of(capacity, kSplit)),
                      limit_of(left),
                      softcap,
                      scale,
                      wide};
    return launch_decode(d, Heads<T>{static_cast<T*>(out), out_batch, out_head, out_row}, lse,
                         sinks, sinks_dtype == DType::f32, stream);
  });
}

}  // namespace tilewise
