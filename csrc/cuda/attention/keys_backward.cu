// dk and dv: a block of keys, past which the queries stream that see them, of each head that shares
// these keys. Keys are the rows of all products, so that p and ds are operands as they are.
#include "cuda/attention/backward.cuh"

namespace tilewise {
namespace {

template <typename T>
struct Backward {
  Attention<T> a;
  Heads<T> dk, dv;
  Heads<const T> dout;
  const float* statistics;
};

// As in forward.cu; registers and shared bytes for heads of 32, 64 and 128: 187, 223, 245 and
// 32256, 56832, 70400; scored 240, 255, 249. Of packed sequences: 190, 226, 245; scored 254, 255,
// 246.
template <int kDim>
struct Shape {
  static constexpr int kDown = 1, kQueries = kDim <= 64 ? 64 : 32;
  static constexpr int kKeys = kAttentionWarps * 16 * kDown;
};

template <typename T, int kDim>
struct Shared {
  using Queries = Tile<T, Shape<kDim>::kQueries, kDim>;
  Tile<T, Shape<kDim>::kKeys, kDim> k, v;
  Queries q[2], dout[2];
  float statistics[2][kStatistics][Shape<kDim>::kQueries];
};

// What a warp does.
template <typename T, int kDim, bool kScored>
struct Work {
  static constexpr int kDown = Shape<kDim>::kDown, kQueries = Shape<kDim>::kQueries;

  const Backward<T>& b;
  const Block& block;
  Shared<T, kDim>& shared;
  const int key0, row;  // of the block, and where in it the warp's begin
  Fragments<kDown, kDim / 8> dk = {}, dv = {};

  __device__ Work(const Backward<T>& b, Shared<T, kDim>& shared, const Block& block)
      : b(b),
        block(block),
        shared(shared),
        key0(block.tile * Shape<kDim>::kKeys),
        row(threadIdx.x / kWarpSize * 16 * kDown) {}

  template <bool kChecked>
  __device__ void attend(int head, int tile, int buffer) {
    Fragments<kDown, kQueries / 8> s, ds;
    multiply_across<T>(s, shared.q[buffer], [&](uint32_t(&a)[4], int m, int k) {
      load_rows(a, shared.k, row + 16 * m, 16 * k);
    });
    multiply_across<T>(ds, shared.dout[buffer], [&](uint32_t(&a)[4], int m, int k) {
      load_rows(a, shared.v, row + 16 * m, 16 * k);
    });
    const Scores<T> scores(b.a, block, head);
    const Kept kept(b.a.options.dropout, int64_t{block.batch} * b.a.size.heads + head,
                    b.a.size.seq_q);
    const int col = 2 * (threadIdx.x % 4);
    const auto& of = shared.statistics[buffer];
    differentiate<kScored, kChecked>(s, ds, scores, kept,
                                     Pairs<true>::of(tile * kQueries, key0, row), true,
                                     [&](int, int n, int e) -> Statistics {
                                       const int i = 8 * n + col + e % 2;
                                       return {of[0][i], of[1][i], of[2][i]};
                                     });
    multiply_down<T>(dv, s, shared.dout[buffer]);
    multiply_down<T>(dk, ds, shared.q[buffer]);
  }

  __device__ void end() {
    const Dropout& dropout = b.a.options.dropout;
    const float kept_scale = dropout.threshold ? dropout.scale : 1.f;
#pragma unroll
    for (int i = 0; i < kDown * kDim / 2; ++i) {
      const int m = i / (kDim / 2), n = i / 4 % (kDim / 8), e = i % 4;
      dk[m][n][e] *= b.a.scale;
      if (kScored) dv[m][n][e] *= kept_scale;
    }
    put_rows<!kScored>(b.dk.of(block.first_k, block.head), b.dk.row, dk, shared.k, row, key0,
                       block.seq_k, b.a.size.dim, b.a.wide);
    put_rows<!kScored>(b.dv.of(block.first_k, block.head), b.dv.row, dv, shared.v, row, key0,
                       block.seq_k, b.a.size.v_dim, b.a.wide);
  }
};

// Copy the statistics of the queries from query0 on of a head; those there are none of are 0.
template <int kQueries>
__device__ void fetch_statistics(float (&to)[kStatistics][kQueries], const float* from,
                                 int64_t count, int64_t head_row, int query0, int seq_q) {
#pragma unroll
  for (int i = threadIdx.x; i < kStatistics * kQueries; i += kAttentionThreads) {
    const int which = i / kQueries, r = i % kQueries;
    const bool inside = query0 + r < seq_q;
    const float* source = inside ? from + which * count + head_row + query0 + r : from;
    copy_async<4>(&to[which][r], source, inside ? 4 : 0);
  }
}

// What a block does.
template <typename T, int kDim, bool kScored>
__device__ void backward(const Backward<T>& b, Block block) {
  constexpr int kQueries = Shape<kDim>::kQueries, kKeys = Shape<kDim>::kKeys;
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(dynamic_shared());
  const Attention<T>& a = b.a;
  const Sizes& size = a.size;
  if (!block.take((block.seq_k + kKeys - 1) / kKeys, false)) return;
  const int key0 = block.tile * kKeys, group = a.group();
  const Reach queries(key0, min(key0 + kKeys, block.seq_k) - 1, -block.ahead(), a.options.right,
                      a.options.left, block.seq_q, kQueries);
  const int whole = kScored ? 0 : queries.whole(), count = queries.count();
  Work<T, kDim, kScored> work(b, shared, block);
  const auto stream = [&](int head, int n, int buffer) {
    const int query0 = queries.at(n) * kQueries;
    fetch<!kScored>(shared.q[buffer], a.q.of(block.first_q, head), a.q.row, query0, block.seq_q,
                    size.dim, a.wide);
    fetch<!kScored>(shared.dout[buffer], b.dout.of(block.first_q, head), b.dout.row, query0,
                    block.seq_q, size.v_dim, a.wide);
    fetch_statistics(shared.statistics[buffer], b.statistics, a.lines.count,
                     a.lines.of(block.first_q, head), query0, block.seq_q);
    copy_async_commit();
  };

  const int head0 = block.head * group;
  int buffer = 0;
  if (count > 0) {
    fetch<!kScored>(shared.k, a.k.of(block.first_k, block.head), a.k.row, key0, block.seq_k,
                    size.dim, a.wide);
    fetch<!kScored>(shared.v, a.v.of(block.first_k, block.head), a.v.row, key0, block.seq_k,
                    size.v_dim, a.wide);
    stream(head0, 0, 0);
  }
#pragma unroll 1
  for (int head = head0; head < head0 + group; ++head) {
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      copy_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody reads the one before it any more
      const bool last = n + 1 == count;
      if (!last || head + 1 < head0 + group) stream(head + last, last ? 0 : n + 1, buffer ^ 1);
      if (n < whole) {
        work.template attend<false>(head, queries.at(n), buffer);
      } else {
        work.template attend<true>(head, queries.at(n), buffer);
      }
      buffer ^= 1;
    }
  }
  work.end();
}

template <typename T, int kDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    keys_backward_kernel(const Backward<T> b) {
  backward<T, kDim, kScored>(b, Block(b.a.size, b.a.size.kv_heads));
}

template <typename T, int kDim, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    packed_keys_backward_kernel(const Backward<T> b, const Packed packed) {
  backward<T, kDim, kScored>(b, Block(b.a.size, b.a.size.kv_heads, packed));
}

}  // namespace

cudaError_t attention_keys_backward(
    void* dk, void* dv, const void* dout, const float* statistics, const void* q, const void* k,
    const void* v, const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dk_batch, int64_t dk_head, int64_t dk_row, int64_t dv_batch, int64_t dv_head,
    int64_t dv_row, int64_t dout_batch, int64_t dout_head, int64_t dout_row, int64_t q_batch,
    int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
    int64_t v_head, int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query,
    int64_t mask_key, int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
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
      can_vectorise<8>(addresses(dk, dv, dout, q, k, v), dim, v_dim, dk_batch, dk_head, dk_row,
                       dv_batch, dv_head, dv_row, dout_batch, dout_head, dout_row, q_batch, q_head,
                       q_row, k_batch, k_head, k_row, v_batch, v_head, v_row);
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
                        {static_cast<T*>(dk), dk_batch, dk_head, dk_row},
                        {static_cast<T*>(dv), dv_batch, dv_head, dv_row},
                        {static_cast<const T*>(dout), dout_batch, dout_head, dout_row},
                        statistics};
    return for_width(size, is_scored(b.a), [&](auto width, auto scored) {
      constexpr int kDim = decltype(width)::value, kKeys = Shape<kDim>::kKeys;
      constexpr bool kScored = decltype(scored)::value;
      constexpr int64_t kShared = sizeof(Shared<T, kDim>);
      if (ends_q) {
        return launch_tiles(packed_keys_backward_kernel<T, kDim, kScored>, batch * kv_heads,
                            tiles_of(std::min(seq_k, rows_k), kKeys), kShared, stream, b, packed);
      }
      return launch_tiles(keys_backward_kernel<T, kDim, kScored>, batch * kv_heads,
                          tiles_of(seq_k, kKeys), kShared, stream, b);
    });
  });
}

}  // namespace tilewise
