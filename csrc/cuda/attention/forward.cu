// A block of queries, past which keys and values stream in two buffers: while the tensor cores work
// on one tile the next is on its way. The sums of the softmax are kept online (Dao,
// https://arxiv.org/abs/2307.08691): what was added up so far is rescaled when a higher score
// comes.
#include "cuda/attention/forward.cuh"

namespace tilewise {
namespace {

// How many times 16 queries a warp has, and keys of a tile. nvcc 13.0 has no spills on sm_80, 90a,
// 100a and 120. For heads of 32, 64, 96 and 128, of 192 with values of 128, and of 256: registers,
// the most of these four, 216, 238, 215, 249, 254, 241, scored 199, 228, 182, 193, 203, 252; of
// packed sequences 238, 244, 221, 255, 255, 248, scored 220, 229, 187, 197, 207, 255. Shared bytes
// of a block: 30720, 55296, 53248, 69632, 94208, 101376, scored 25600, 46080, 39936, 52224, 68608,
// 101376, which is all that sm_86, 89 and 120 let a block have.
template <int kDim, int kVDim, bool kScored>
struct Shape {
  static constexpr int kDown = kScored || kVDim > 128 ? 1 : 2, kKeys = kDim <= 64 ? 64 : 32;
  static constexpr int kQueries = kAttentionWarps * 16 * kDown;
};

template <typename T, int kDim, int kVDim, bool kScored>
struct Shared {
  using S = Shape<kDim, kVDim, kScored>;
  Tile<T, S::kQueries, kDim> q;
  Tile<T, S::kKeys, kDim> k[2];
  Tile<T, S::kKeys, kVDim> v[2];
};

// What a warp does.
template <typename T, int kDim, int kVDim, bool kScored>
struct Work {
  using S = Shape<kDim, kVDim, kScored>;
  static constexpr int kDown = S::kDown, kKeys = S::kKeys;
  static constexpr bool kHeld = kDim <= 32;  // queries stay in registers

  const Forward<T>& f;
  const Scores<T> scores;
  const Kept kept;
  Shared<T, kDim, kVDim, kScored>& shared;
  const int query0, row;  // of the block, and where in it the warp's begin
  Fragments<kDown, kVDim / 8> sums = {};
  float highest[kDown][2], total[kDown][2];
  uint32_t q[kHeld ? kDim / 16 : 1][kDown][4];

  __device__ Work(const Forward<T>& f, Shared<T, kDim, kVDim, kScored>& shared, const Block& block)
      : f(f),
        scores(f.a, block, block.head),
        kept(f.a.options.dropout, block.index, f.a.size.seq_q),
        shared(shared),
        query0(block.tile * S::kQueries),
        row(threadIdx.x / kWarpSize * 16 * kDown) {
    const bool sunk = kScored && f.a.options.sinks;
    const float sink = sunk ? scores.sink(block.head) : -INFINITY;
    const bool counts = sink > -INFINITY && threadIdx.x % 4 == 0;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      highest[i / 2][i % 2] = sink;
      total[i / 2][i % 2] = counts ? 1.f : 0.f;
    }
  }

  __device__ void load_queries() {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kDim / 16 * kDown; ++i) {
        load_rows(q[i / kDown][i % kDown], shared.q, row + 16 * (i % kDown), i / kDown * 16);
      }
    }
  }

  template <bool kChecked>
  __device__ void attend(int tile, int buffer) {
    Fragments<kDown, kKeys / 8> s;
    multiply_across<T>(s, shared.k[buffer], [&](uint32_t(&a)[4], int m, int k) {
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q[k][m][i];
      } else {
        load_rows(a, shared.q, row + 16 * m, 16 * k);
      }
    });
    const auto pairs = Pairs<false>::of(query0, tile * kKeys, row);
    if constexpr (kScored) {
      scores.cap(s, pairs);
      scores.finish(s, pairs);
    } else if constexpr (kChecked) {
      scores.limit(s, pairs);
    }
    accumulate<kChecked || kScored>(s);
    if constexpr (kScored) {
      if (f.a.options.dropout.threshold) {
        kept.each<kDown, kKeys / 8>(pairs, [&](int m, int n, int e, bool keep) {
          if (!keep) s[m][n][e] = 0.f;
        });
      }
    }
    multiply_down<T>(sums, s, shared.v[buffer]);
  }

  // Scores to powers of two, of which those of before are rescaled. kEmpty: there may be none yet.
  template <bool kEmpty>
  __device__ void accumulate(Fragments<kDown, kKeys / 8>& s) {
    const float factor = f.a.template factor<kScored>();
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const int m = i / 2, half = 2 * (i % 2);
      const float rescale = soften<kEmpty>(s[m], half, highest[m][i % 2], total[m][i % 2], factor);
#pragma unroll
      for (int n = 0; n < kVDim / 8; ++n) {
        sums[m][n][half] *= rescale;
        sums[m][n][half + 1] *= rescale;
      }
    }
  }

  __device__ void end(const Block& block) {
    const float factor = f.a.template factor<kScored>();
    const float kept_scale = f.a.options.dropout.threshold ? f.a.options.dropout.scale : 1.f;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const int m = i / 2, half = 2 * (i % 2);
      float sum = total[m][i % 2];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const float part = sum == 0.f ? 0.f : kept_scale / sum;
#pragma unroll
      for (int n = 0; n < kVDim / 8; ++n) {
        sums[m][n][half] *= part;
        sums[m][n][half + 1] *= part;
      }
      const int query = query0 + row + 16 * m + 4 * half + threadIdx.x % kWarpSize / 4;
      if (threadIdx.x % 4 == 0 && query < block.seq_q) {
        const int64_t place = f.a.lines.of(block.first_q, block.head) + query;
        f.highest[place] = highest[m][i % 2] * factor;
        f.total[place] = sum;
      }
    }
    put_rows<!kScored>(f.out.of(block.first_q, block.head), f.out.row, sums, shared.q, row, query0,
                       block.seq_q, f.a.size.v_dim, f.a.wide);
  }
};

// What a block does.
template <typename T, int kDim, int kVDim, bool kScored>
__device__ void forward(const Forward<T>& f, Block block) {
  using S = Shape<kDim, kVDim, kScored>;
  constexpr int kQueries = S::kQueries, kKeys = S::kKeys;
  auto& shared = *reinterpret_cast<Shared<T, kDim, kVDim, kScored>*>(dynamic_shared());
  const Attention<T>& a = f.a;
  const Sizes& size = a.size;
  const int tiles = (block.seq_q + kQueries - 1) / kQueries;
  if (!block.take(tiles, a.options.right >= 0)) return;
  const int query0 = block.tile * kQueries;
  const Reach keys(query0, min(query0 + kQueries, block.seq_q) - 1, block.ahead(), a.options.left,
                   a.options.right, block.seq_k, kKeys);
  uint32_t kv_head = block.head / a.group();
  Work<T, kDim, kVDim, kScored> work(f, shared, block);
  const auto stream = [&](int n) {
    forget(kv_head);  // no registers for where keys and values begin
    const T* k = a.k.of(block.first_k, kv_head);
    const T* v = a.v.of(block.first_k, kv_head);
    const int key0 = keys.at(n) * kKeys;
    const uint8_t* shown = kScored ? work.scores.shown : nullptr;
    const int64_t apart = a.options.mask_strides.col;
    fetch<!kScored>(shared.k[n % 2], k, a.k.row, key0, block.seq_k, size.dim, a.wide, shown, apart);
    fetch<!kScored>(shared.v[n % 2], v, a.v.row, key0, block.seq_k, size.v_dim, a.wide, shown,
                    apart);
    copy_async_commit();
  };

  const int whole = kScored ? 0 : keys.whole(), count = keys.count();
  if (count > 0) {
    fetch<!kScored>(shared.q, a.q.of(block.first_q, block.head), a.q.row, query0, block.seq_q,
                    size.dim, a.wide);
    stream(0);
    copy_async_wait<0>();
    __syncthreads();
    work.load_queries();
  }
  const auto arrive = [&](int n) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    if (n + 1 < count) stream(n + 1);
  };
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
  work.end(block);
}

template <typename T, int kDim, int kVDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    forward_kernel(const Forward<T> f) {
  forward<T, kDim, kVDim, kScored>(f, Block(f.a.size, f.a.size.heads));
}

template <typename T, int kDim, int kVDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    packed_forward_kernel(const Forward<T> f, const Packed packed) {
  forward<T, kDim, kVDim, kScored>(f, Block(f.a.size, f.a.size.heads, packed));
}

}  // namespace

cudaError_t attention_forward(
    void* out, float* highest, float* total, const void* q, const void* k, const void* v,
    const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t out_batch, int64_t out_head, int64_t out_row, int64_t q_batch, int64_t q_head,
    int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head,
    int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query, int64_t mask_key,
    int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
    DType bias_dtype, DType sinks_dtype, cudaStream_t stream) {
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
      can_vectorise<8>(addresses(out, q, k, v), dim, v_dim, out_batch, out_head, out_row, q_batch,
                       q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row);
  return for_half(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Forward<T> f{{{static_cast<const T*>(q), q_batch, q_head, q_row},
                        {static_cast<const T*>(k), k_batch, k_head, k_row},
                        {static_cast<const T*>(v), v_batch, v_head, v_row},
                        size,
                        lines_of(size, packed),
                        options,
                        scale,
                        wide},
                       {static_cast<T*>(out), out_batch, out_head, out_row},
                       highest,
                       total};
#ifdef TILEWISE_HOPPER
    if (is_for_hopper(f, packed)) return hopper_forward(f, packed, stream);
#endif
    return for_widths(size, is_scored(f.a), [&](auto widths, auto scored) {
      constexpr int kDim = decltype(widths)::kDim, kVDim = decltype(widths)::kVDim;
      constexpr bool kScored = decltype(scored)::value;
      constexpr int kQueries = Shape<kDim, kVDim, kScored>::kQueries;
      constexpr int64_t kShared = sizeof(Shared<T, kDim, kVDim, kScored>);
      if (ends_q) {
        return launch_tiles(packed_forward_kernel<T, kDim, kVDim, kScored>, batch * heads,
                            tiles_of(std::min(seq_q, rows_q), kQueries), kShared, stream, f,
                            packed);
      }
      return launch_tiles(forward_kernel<T, kDim, kVDim, kScored>, batch * heads,
                          tiles_of(seq_q, kQueries), kShared, stream, f);
    });
  });
}

}  // namespace tilewise
