// dk and dv: a block of keys, past which the queries stream that see them, of each head that shares
// these keys. Keys are the rows of all products, so that p and ds are operands as they are.
#include "cuda/attention/backward.cuh"

namespace tilewise {
namespace {

template <typename T>
using Backward = KeysBackward<T>;

// As in forward.cu; registers of the six 195, 223, 228, 253, 255, 239, scored 242, 255, 232, 246,
// 250, 242; of packed sequences 199, 226, 231, 251, 255, 240, scored 254, 255, 238, 246, 249, 239.
// Shared bytes: 30720, 55296, 53248, 69632, 64512, 101376. With 32 queries a tile, heads of 192
// with values of 128 spill on sm_80.
template <int kDim, int kVDim>
struct Shape {
  static constexpr int kDown = 1, kQueries = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kKeys = kAttentionWarps * 16 * kDown;
};

// Statistics are beside the rows of queries.
template <typename T, int kDim, int kVDim>
struct Shared {
  using S = Shape<kDim, kVDim>;
  Tile<T, S::kKeys, kDim> k;
  Tile<T, S::kKeys, kVDim> v;
  Tile<T, S::kQueries, kDim> q[2];
  Tile<T, S::kQueries, kVDim> dout[2];
};

// What a warp does. kDk, kDv: for which of the two.
template <typename T, int kDim, int kVDim, bool kDk, bool kDv, bool kScored>
struct Work {
  static constexpr int kDown = Shape<kDim, kVDim>::kDown, kQueries = Shape<kDim, kVDim>::kQueries;

  const Backward<T>& b;
  const Block& block;
  Shared<T, kDim, kVDim>& shared;
  const int key0, row;  // of the block, and where in it the warp's begin
  Fragments<kDown, kDim / 8> dk = {};
  Fragments<kDown, kVDim / 8> dv = {};

  __device__ Work(const Backward<T>& b, Shared<T, kDim, kVDim>& shared, const Block& block)
      : b(b),
        block(block),
        shared(shared),
        key0(block.tile * Shape<kDim, kVDim>::kKeys),
        row(threadIdx.x / kWarpSize * 16 * kDown) {}

  template <bool kChecked>
  __device__ void attend(int head, int tile, int buffer) {
    Fragments<kDown, kQueries / 8> s, ds = {};
    multiply_across<T>(s, shared.q[buffer], [&](uint32_t(&a)[4], int m, int k) {
      load_rows(a, shared.k, row + 16 * m, 16 * k);
    });
    if constexpr (kDk) {
      multiply_across<T>(ds, shared.dout[buffer], [&](uint32_t(&a)[4], int m, int k) {
        load_rows(a, shared.v, row + 16 * m, 16 * k);
      });
    }
    const Scores<T> scores(b.a, block, head);
    const Kept kept(b.a.options.dropout, int64_t{block.batch} * b.a.size.heads + head,
                    b.a.size.seq_q);
    const int col = 2 * (threadIdx.x % 4);
    differentiate<kScored, kChecked, true>(s, ds, scores, kept,
                                           Pairs<true>::of(tile * kQueries, key0, row), true,
                                           [&](int, int n, int e) -> Statistics {
                                             const int i = 8 * n + col + e % 2;
                                             const float4 of = shared.q[buffer].beside(i);
                                             return {of.x, of.y, of.z};
                                           });
    if constexpr (kDv) multiply_down<T>(dv, s, shared.dout[buffer]);
    if constexpr (kDk) multiply_down<T>(dk, ds, shared.q[buffer]);
  }

  // By way of the keys, which this warp alone has had these rows of.
  template <int kAcross>
  __device__ void put(const Heads<T>& to, Fragments<kDown, kAcross>& sums, int cols, float scale) {
#pragma unroll
    for (int i = 0; i < kDown * kAcross * 4; ++i) {
      sums[i / (kAcross * 4)][i / 4 % kAcross][i % 4] *= scale;
    }
    put_rows<!kScored>(to.of(block.first_k, block.head), to.row, sums, shared.k, row, key0,
                       block.seq_k, cols, b.a.wide);
  }

  __device__ void end() {
    const Dropout& dropout = b.a.options.dropout;
    const float kept_scale = kScored && dropout.threshold ? dropout.scale : 1.f;
    if constexpr (kDk) put(b.dk, dk, b.a.size.dim, b.a.scale);
    if constexpr (kDv) put(b.dv, dv, b.a.size.v_dim, kept_scale);
  }
};

// What a block does.
template <typename T, int kDim, int kVDim, bool kDk, bool kDv, bool kScored>
__device__ void backward(const Backward<T>& b, Block block) {
  constexpr int kQueries = Shape<kDim, kVDim>::kQueries, kKeys = Shape<kDim, kVDim>::kKeys;
  auto& shared = *reinterpret_cast<Shared<T, kDim, kVDim>*>(dynamic_shared());
  const Attention<T>& a = b.a;
  const Sizes& size = a.size;
  if (!block.take((block.seq_k + kKeys - 1) / kKeys, false)) return;
  const int key0 = block.tile * kKeys, group = a.group();
  const Reach queries(key0, min(key0 + kKeys, block.seq_k) - 1, -block.ahead(), a.options.right,
                      a.options.left, block.seq_q, kQueries);
  const int whole = kScored ? 0 : queries.whole(), count = queries.count();
  Work<T, kDim, kVDim, kDk, kDv, kScored> work(b, shared, block);
  const auto stream = [&](int head, int n, int buffer) {
    const int query0 = queries.at(n) * kQueries;
    fetch<!kScored>(shared.q[buffer], a.q.of(block.first_q, head), a.q.row, query0, block.seq_q,
                    size.dim, a.wide);
    fetch<!kScored>(shared.dout[buffer], b.dout.of(block.first_q, head), b.dout.row, query0,
                    block.seq_q, size.v_dim, a.wide);
    fetch_statistics(shared.q[buffer], kQueries, b.statistics, a.lines.count,
                     a.lines.of(block.first_q, head), query0, block.seq_q);
    copy_async_commit();
  };

  const int head0 = block.head * group;
  int buffer = 0;
  if (count > 0) {
    fetch<!kScored>(shared.k, a.k.of(block.first_k, block.head), a.k.row, key0, block.seq_k,
                    size.dim, a.wide);
    if constexpr (kDk) {
      fetch<!kScored>(shared.v, a.v.of(block.first_k, block.head), a.v.row, key0, block.seq_k,
                      size.v_dim, a.wide);
    }
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

template <typename T, int kDim, int kVDim, bool kDk, bool kDv, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    keys_backward_kernel(const Backward<T> b) {
  backward<T, kDim, kVDim, kDk, kDv, kScored>(b, Block(b.a.size, b.a.size.kv_heads));
}

template <typename T, int kDim, int kVDim, bool kDk, bool kDv, bool kScored>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    packed_keys_backward_kernel(const Backward<T> b, const Packed packed) {
  backward<T, kDim, kVDim, kDk, kDv, kScored>(b, Block(b.a.size, b.a.size.kv_heads, packed));
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
#ifdef TILEWISE_HOPPER
    if (!ends_q && is_for_hopper(b)) return hopper_keys_backward(b, stream);
#endif
    return for_widths(size, is_scored(b.a), [&](auto widths, auto scored) {
      constexpr int kDim = decltype(widths)::kDim, kVDim = decltype(widths)::kVDim;
      constexpr int kKeys = Shape<kDim, kVDim>::kKeys;
      constexpr bool kScored = decltype(scored)::value;
      constexpr int64_t kShared = sizeof(Shared<T, kDim, kVDim>);
      const auto run = [&](auto of_dk, auto of_dv) {
        constexpr bool kDk = decltype(of_dk)::value, kDv = decltype(of_dv)::value;
        if (ends_q) {
          return launch_tiles(packed_keys_backward_kernel<T, kDim, kVDim, kDk, kDv, kScored>,
                              batch * kv_heads, tiles_of(std::min(seq_k, rows_k), kKeys), kShared,
                              stream, b, packed);
        }
        return launch_tiles(keys_backward_kernel<T, kDim, kVDim, kDk, kDv, kScored>,
                            batch * kv_heads, tiles_of(seq_k, kKeys), kShared, stream, b);
      };
      if constexpr (kVDim <= 128) {
        return run(std::true_type{}, std::true_type{});
      } else {  // the sums of both do not fit in registers
        const cudaError_t status = run(std::false_type{}, std::true_type{});
        return status != cudaSuccess ? status : run(std::true_type{}, std::false_type{});
      }
    });
  });
}

}  // namespace tilewise
