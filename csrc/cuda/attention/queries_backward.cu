// dq: a block of queries, past which keys and values stream as in the forward pass. It leaves the
// statistics of its queries to the kernels that come after it. Of these delta is only as exact as
// out, which is rounded: alike for all keys of a query, so that the sum over queries that is the
// gradient of a bias does not average it away. For this it is added up from the probabilities too.
// A bias with an element for every score is no such sum, and has its gradient from here.
#include "cuda/attention/backward.cuh"

namespace tilewise {
namespace {

template <typename T>
struct Backward {
  Attention<T> a;
  Heads<T> dq;
  T* dbias;
  float* statistics;
  Heads<const T> dout, out;
  const float *dlse, *highest, *total;
  bool exact;

  __device__ bool sees_keys() const { return dq.at || dbias || exact; }
};

// As in forward.cu; registers of the six 173, 200, 194, 209, 246, 243, scored 254, 255, 228, 242, 255, 246;
// of packed sequences 175, 202, 196, 213, 248, 244, scored 254, 255, 232, 242, 255, 249.
// Shared bytes: 30720, 55296, 53248, 69632, 86016, 101376.
template <int kDim, int kVDim>
struct Shape {
  static constexpr int kDown = 1, kKeys = kDim <= 64 ? 64 : kVDim <= 128 ? 32 : 16;
  static constexpr int kQueries = kAttentionWarps * 16 * kDown;
};

// Delta is beside the rows of dout.
template <typename T, int kDim, int kVDim>
struct Shared {
  using S = Shape<kDim, kVDim>;
  Tile<T, S::kQueries, kDim> q;
  Tile<T, S::kQueries, kVDim> dout;
  Tile<T, S::kKeys, kDim> k[2];
  Tile<T, S::kKeys, kVDim> v[2];
};

// What a warp does.
template <typename T, int kDim, int kVDim, bool kScored>
struct Work {
  static constexpr int kDown = Shape<kDim, kVDim>::kDown, kKeys = Shape<kDim, kVDim>::kKeys;

  const Backward<T>& b;
  const Block& block;
  const Scores<T> scores;
  const Kept kept;
  Shared<T, kDim, kVDim>& shared;
  const int query0, row;  // of the block, and where in it the warp's begin
  Fragments<kDown, kDim / 8> dq = {};
  Statistics rows[kDown][2];
  float exact[kDown][2] = {};  // delta, as a lane adds it up

  __device__ Work(const Backward<T>& b, Shared<T, kDim, kVDim>& shared, const Block& block)
      : b(b),
        block(block),
        scores(b.a, block, block.head),
        kept(b.a.options.dropout, block.index, b.a.size.seq_q),
        shared(shared),
        query0(block.tile * Shape<kDim, kVDim>::kQueries),
        row(threadIdx.x / kWarpSize * 16 * kDown) {}

  __device__ bool is_exact() const { return kScored && b.exact; }

  __device__ void multiply_keys(Fragments<kDown, kKeys / 8>& s, int buffer) {
    multiply_across<T>(s, shared.k[buffer], [&](uint32_t(&a)[4], int m, int k) {
      load_rows(a, shared.q, row + 16 * m, 16 * k);
    });
  }

  // sum(dout out), by as many lanes a row as it has accesses.
  __device__ void multiply_outputs() {
    constexpr int kWidth = kVector<T>, kLanes = kVDim == 96 ? 16 : kVDim / kWidth;
    constexpr int kRows = kWarpSize / kLanes;
    const int lane = threadIdx.x % kWarpSize, col = lane % kLanes * kWidth;
    const Sizes& size = b.a.size;
    const T* out = b.out.of(block.first_q, block.head);
#pragma unroll 1
    for (int r = row + lane / kLanes; r < row + 16 * kDown; r += kRows) {
      float sum = 0.f;
      if (query0 + r < block.seq_q && col < size.v_dim) {
        const T *y = out + (query0 + r) * b.out.row + col, *dy = shared.dout.row(r) + col;
        if (!kScored || b.a.wide) {
          float ys[kWidth], dys[kWidth];
          load(ys, y);
          load(dys, dy);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum += ys[i] * dys[i];
        } else {
#pragma unroll 1
          for (int i = 0; i < min(kWidth, size.v_dim - col); ++i) {
            sum += to_float(y[i]) * to_float(dy[i]);
          }
        }
      }
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, other);
      }
      if (lane % kLanes == 0) shared.dout.beside(r).x = sum;
    }
    __syncwarp();
  }

  __device__ void begin() {
    multiply_outputs();
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const int r = row + 8 * i + threadIdx.x % kWarpSize / 4, query = query0 + r;
      Statistics& mine = rows[i / 2][i % 2];
      mine = {0.f, 0.f, 0.f};
      if (query >= block.seq_q) continue;
      const int64_t place = b.a.lines.of(block.first_q, block.head) + query;
      const float total = b.total[place];
      if (total == 0.f) continue;
      mine = {b.highest[place], 1.f / total, shared.dout.beside(r).x};
      if (!b.dlse) continue;
      const float dlse = b.dlse[place];
      mine.delta -= dlse;
      if (threadIdx.x % 4 == 0) exact[i / 2][i % 2] = -dlse;
    }
  }

  __device__ void put_statistics() {
    const int64_t count = b.a.lines.count;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const int query = query0 + row + 8 * i + threadIdx.x % kWarpSize / 4;
      const Statistics& mine = rows[i / 2][i % 2];
      float sum = exact[i / 2][i % 2];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (query >= block.seq_q || threadIdx.x % 4 != 0) continue;
      const int64_t place = b.a.lines.of(block.first_q, block.head) + query;
      b.statistics[place] = mine.highest;
      b.statistics[place + count] = mine.part;
      b.statistics[place + 2 * count] = is_exact() ? sum : mine.delta;
    }
  }

  template <bool kChecked>
  __device__ void attend(int tile, int buffer) {
    Fragments<kDown, kKeys / 8> s, ds;
    multiply_keys(s, buffer);
    multiply_across<T>(ds, shared.v[buffer], [&](uint32_t(&a)[4], int m, int k) {
      load_rows(a, shared.dout, row + 16 * m, 16 * k);
    });
    const bool adds = is_exact();
    differentiate<kScored, kChecked, false>(
        s, ds, scores, kept, Pairs<false>::of(query0, tile * kKeys, row), !adds,
        [&](int m, int, int e) -> Statistics {
          const Statistics& mine = rows[m][e / 2];
          return {mine.highest, mine.part, adds ? 0.f : mine.delta};
        });
    if (adds) add_exactly(s, ds, buffer);
    if (kScored && b.dbias) put_scores(ds, tile * kKeys);
    multiply_down<T>(dq, ds, shared.k[buffer]);
  }

  __device__ void put_scores(const Fragments<kDown, kKeys / 8>& ds, int key0) {
    const int lane = threadIdx.x % kWarpSize, seq_k = block.seq_k;
    const bool even = seq_k % 2 == 0;
#pragma unroll
    for (int i = 0; i < kDown * kKeys / 4; ++i) {
      const int m = i / (kKeys / 4), n = i / 2 % (kKeys / 8), e = i % 2 * 2;
      const int query = query0 + row + 16 * m + 4 * e + lane / 4;
      const int key = key0 + 8 * n + 2 * (lane % 4);
      if (query >= block.seq_q || key >= seq_k) continue;
      T* to = b.dbias + (block.index * block.seq_q + query) * int64_t{seq_k} + key;
      if (even) {
        *reinterpret_cast<uint32_t*>(to) = rounded_pair<T>(ds[m][n][e], ds[m][n][e + 1]);
      } else {
        to[0] = from_float<T>(ds[m][n][e]);
        if (key + 1 < seq_k) to[1] = from_float<T>(ds[m][n][e + 1]);
      }
    }
  }

  // ds is p dp, for it was made of a delta of 0: add that up, and take delta from it now. Where
  // scores are capped, the products are made again: there is no room for them and p.
  __device__ void add_exactly(Fragments<kDown, kKeys / 8>& s, Fragments<kDown, kKeys / 8>& ds,
                              int buffer) {
    const auto each = [&](auto body) {
#pragma unroll
      for (int i = 0; i < kDown * kKeys / 2; ++i) {
        const int m = i / (kKeys / 2), n = i / 4 % (kKeys / 8), e = i % 4;
        body(s[m][n][e], ds[m][n][e], m, e / 2);
      }
    };
    each([&](float& p, float& dp, int m, int half) {
      exact[m][half] += dp;
      dp -= p * rows[m][half].delta;
    });
    if (b.a.options.softcap == 0.f) return;
    multiply_keys(s, buffer);
    each([](float& product, float& value, int, int) {
      if (value == 0.f) product = 0.f;  // of hidden keys it may be NaN
    });
    scores.cap_both(s, ds, Pairs<false>{});
  }

  __device__ void end() {
    put_statistics();
    if (!b.dq.at) return;
#pragma unroll
    for (int i = 0; i < kDown * kDim / 2; ++i) {
      dq[i / (kDim / 2)][i / 4 % (kDim / 8)][i % 4] *= b.a.scale;
    }
    put_rows<!kScored>(b.dq.of(block.first_q, block.head), b.dq.row, dq, shared.q, row, query0,
                       block.seq_q, b.a.size.dim, b.a.wide);
  }
};

// What a block does.
template <typename T, int kDim, int kVDim, bool kScored>
__device__ void backward(const Backward<T>& b, Block block) {
  constexpr int kQueries = Shape<kDim, kVDim>::kQueries, kKeys = Shape<kDim, kVDim>::kKeys;
  auto& shared = *reinterpret_cast<Shared<T, kDim, kVDim>*>(dynamic_shared());
  const Attention<T>& a = b.a;
  const Sizes& size = a.size;
  const int tiles = (block.seq_q + kQueries - 1) / kQueries;
  if (!block.take(tiles, a.options.right >= 0)) return;
  const int query0 = block.tile * kQueries;
  const Reach keys(query0, min(query0 + kQueries, block.seq_q) - 1, block.ahead(), a.options.left,
                   a.options.right, block.seq_k, kKeys);
  const T* k = a.k.of(block.first_k, block.head / a.group());
  const T* v = a.v.of(block.first_k, block.head / a.group());
  Work<T, kDim, kVDim, kScored> work(b, shared, block);
  const auto stream = [&](int n) {
    const int key0 = keys.at(n) * kKeys;
    const uint8_t* shown = kScored ? work.scores.shown : nullptr;
    const int64_t apart = a.options.mask_strides.col;
    fetch<!kScored>(shared.k[n % 2], k, a.k.row, key0, block.seq_k, size.dim, a.wide, shown, apart);
    fetch<!kScored>(shared.v[n % 2], v, a.v.row, key0, block.seq_k, size.v_dim, a.wide, shown,
                    apart);
    copy_async_commit();
  };

  fetch<!kScored>(shared.q, a.q.of(block.first_q, block.head), a.q.row, query0, block.seq_q,
                  size.dim, a.wide);
  fetch<!kScored>(shared.dout, b.dout.of(block.first_q, block.head), b.dout.row, query0,
                  block.seq_q, size.v_dim, a.wide);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int count = b.sees_keys() ? keys.count() : 0;
  const int whole = kScored ? 0 : min(keys.whole(), count);
  const auto arrive = [&](int n) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    if (n + 1 < count) stream(n + 1);
  };
  if (count > 0) stream(0);
  work.begin();
#pragma unroll 1
  for (int n = 0; n < whole; ++n) {
    arrive(n);
    work.template attend<false>(keys.at(n), n % 2);
  }
#pragma unroll 1
  for (int n = whole; n < count; ++n) {
    arrive(n);
    work.template attend<true>(keys.at(n), n % 2);
  }
  work.end();
}

template <typename T, int kDim, int kVDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    queries_backward_kernel(const Backward<T> b) {
  backward<T, kDim, kVDim, kScored>(b, Block(b.a.size, b.a.size.heads));
}

template <typename T, int kDim, int kVDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    packed_queries_backward_kernel(const Backward<T> b, const Packed packed) {
  backward<T, kDim, kVDim, kScored>(b, Block(b.a.size, b.a.size.heads, packed));
}

}  // namespace

cudaError_t attention_queries_backward(
    void* dq, void* dbias, float* statistics, const void* dout, const float* dlse, const void* out,
    const float* highest, const float* total, const void* q, const void* k, const void* v,
    const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dq_batch, int64_t dq_head, int64_t dq_row, int64_t dout_batch, int64_t dout_head,
    int64_t dout_row, int64_t out_batch, int64_t out_head, int64_t out_row, int64_t q_batch,
    int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
    int64_t v_head, int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query,
    int64_t mask_key, int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, bool exact,
    DType dtype, DType bias_dtype, DType sinks_dtype, cudaStream_t stream) {
  const Options options{
      mask,
      {mask_batch, mask_head, mask_query, mask_key},
      bias,
      {bias_batch, bias_head, bias_query, bias_key},
      slopes,
      slopes_batch,
      slopes_head,
      sinks,
      bias_dtype == DType::f32,
      sinks_dtype == DType::f32,
      limit_of(left),
      limit_of(right),
      softcap,
      {threshold, kept_scale, seeds, offsets, seed_stride, offset_stride, seed, offset}};
  const Packed packed{ends_q, ends_k, rows_q, rows_k};
  Sizes size;
  if (!are_like(dtype, bias_dtype, sinks_dtype) ||
      !sizes_of(size, batch, heads, kv_heads, seq_q, seq_k, dim, v_dim)) {
    return cudaErrorInvalidValue;
  }
  const bool wide =
      can_vectorise<8>(addresses(dq, dout, out, q, k, v), dim, v_dim, dq_batch, dq_head, dq_row,
                       dout_batch, dout_head, dout_row, out_batch, out_head, out_row, q_batch,
                       q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row);
  return for_half(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Backward<T> b{{{static_cast<const T*>(q), q_batch, q_head, q_row},
                         {static_cast<const T*>(k), k_batch, k_head, k_row},
                         {static_cast<const T*>(v), v_batch, v_head, v_row},
                         size,
                         lines_of(size, packed),
                         options,
                         scale,
                         wide},
                        {static_cast<T*>(dq), dq_batch, dq_head, dq_row},
                        static_cast<T*>(dbias),
                        statistics,
                        {static_cast<const T*>(dout), dout_batch, dout_head, dout_row},
                        {static_cast<const T*>(out), out_batch, out_head, out_row},
                        dlse,
                        highest,
                        total,
                        exact};
#ifdef TILEWISE_HOPPER
    const QueriesBackward<T> plain{b.a, b.dq, statistics, b.dout, b.out, dlse, highest, total};
    if (!ends_q && !dbias && !exact && is_for_hopper(plain)) {
      return hopper_queries_backward(plain, stream);
    }
#endif
    return for_widths(size, is_scored(b.a) || dbias || exact, [&](auto widths, auto scored) {
      constexpr int kDim = decltype(widths)::kDim, kVDim = decltype(widths)::kVDim;
      constexpr int kQueries = Shape<kDim, kVDim>::kQueries;
      constexpr bool kScored = decltype(scored)::value;
      constexpr int64_t kShared = sizeof(Shared<T, kDim, kVDim>);
      if (ends_q) {
        return launch_tiles(packed_queries_backward_kernel<T, kDim, kVDim, kScored>, batch * heads,
                            tiles_of(std::min(seq_q, rows_q), kQueries), kShared, stream, b,
                            packed);
      }
      return launch_tiles(queries_backward_kernel<T, kDim, kVDim, kScored>, batch * heads,
                          tiles_of(seq_q, kQueries), kShared, stream, b);
    });
  });
}

}  // namespace tilewise
