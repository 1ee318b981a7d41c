// New keys and values behind those of a cache, both in one launch, the keys turned on the way.
#include "cuda/attention/cache.cuh"
#include "cuda/elements.cuh"
#include "cuda/rotation.cuh"

namespace tilewise {
namespace {

// Rows of what: keys have `half` pairs to turn and `rest` other columns, values only these.
template <typename T>
struct Tokens {
  T* cache;
  const T* from;
  Strides into, of;  // batch of `into`: the page
  int64_t half, rest;
};

template <typename T, typename C>
struct Append {
  Tokens<T> k, v;
  const int32_t* lengths;
  Cache cache;
  const C *cos, *sin;
  int64_t batch, heads, seq, positions, cos_stride, sin_stride;
};

template <int kWidth, bool kInterleaved, typename T, typename C>
__global__ void __launch_bounds__(kRotationThreads, kRotationBlocks)
    append_kernel(const Append<T, C> a) {
  const int64_t all = 2 * a.heads, rows = a.batch * a.seq * all;
  const int64_t step = gridDim.x * int64_t{blockDim.y};
  for (int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y; row < rows; row += step) {
    const int64_t token = divide(row, all), b = divide(token, a.seq);
    const int64_t number = row - token * all, s = token - b * a.seq;
    const bool is_key = number < a.heads;
    const int64_t head = is_key ? number : number - a.heads;
    const int64_t position = int64_t{a.lengths[b]} + s;
    const Slot slot = a.cache.of(static_cast<int>(b), position);
    if (slot.page < 0) continue;
    const T* x = is_key ? a.k.from + a.k.of.at(b, head, s) : a.v.from + a.v.of.at(b, head, s);
    T* y = is_key ? a.k.cache + a.k.into.at(slot.page, head, slot.token)
                  : a.v.cache + a.v.into.at(slot.page, head, slot.token);
    const int64_t half = is_key ? a.k.half : 0, rest = is_key ? a.k.rest : a.v.rest;
    const bool is_known = position < a.positions;
    for_pairs<kWidth>(half, [&](int64_t pair) {
      float u[kWidth], w[kWidth], c[kWidth], sine[kWidth];
      load_pairs<kWidth, kInterleaved>(u, w, x, pair, half);
      load_angles(c, sine, a.cos + position * a.cos_stride + pair,
                  a.sin + position * a.sin_stride + pair, is_known, 1.f);
      turn(u, w, c, sine);
      store_pairs<kWidth, kInterleaved>(y, u, w, pair, half);
    });
    for_pairs<kWidth>(rest, [&](int64_t col) {
      float u[kWidth];
      load(u, x + 2 * half + col);
      store(y + 2 * half + col, u);
    });
  }
}

template <typename T, typename C>
cudaError_t launch_append(const Append<T, C>& a, bool interleaved, cudaStream_t stream) {
  constexpr int kWide = kVector<T>;
  const auto &k = a.k, &v = a.v;
  const bool wide = can_vectorise<kWide>(
      addresses(k.cache, v.cache, k.from, v.from, a.cos, a.sin), k.half, k.rest, v.rest,
      k.into.batch, k.into.head, k.into.seq, v.into.batch, v.into.head, v.into.seq, k.of.batch,
      k.of.head, k.of.seq, v.of.batch, v.of.head, v.of.seq, a.cos_stride, a.sin_stride);
  const auto kernel =
      wide ? interleaved ? append_kernel<kWide, true, T, C> : append_kernel<kWide, false, T, C>
      : interleaved ? append_kernel<1, true, T, C>
                    : append_kernel<1, false, T, C>;
  const dim3 threads = lanes_for(k.half, std::max(k.rest, v.rest), wide ? kWide : 1);
  const int64_t rows = 2 * a.batch * a.seq * a.heads;
  return launch(kernel, (rows + threads.y - 1) / threads.y, threads, 0, stream, a);
}

}  // namespace

cudaError_t attention_append(void* k_cache, void* v_cache, const void* k, const void* v,
                             const int32_t* lengths, const int32_t* table, const void* cos,
                             const void* sin, int64_t batch, int64_t kv_heads, int64_t seq,
                             int64_t dim, int64_t v_dim, int64_t half, int64_t positions,
                             int64_t capacity, int64_t page_size, int64_t pages,
                             int64_t k_cache_page, int64_t k_cache_head, int64_t k_cache_row,
                             int64_t v_cache_page, int64_t v_cache_head, int64_t v_cache_row,
                             int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
                             int64_t v_head, int64_t v_row, int64_t table_row, int64_t cos_stride,
                             int64_t sin_stride, bool interleaved, DType dtype, DType table_dtype,
                             cudaStream_t stream) {
  const Cache cache{table, table_row, page_size, pages, capacity};
  return for_half(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto with = [&](auto c) {
      using C = typename decltype(c)::type;
      const Append<T, C> a{{static_cast<T*>(k_cache),
                            static_cast<const T*>(k),
                            {k_cache_page, k_cache_head, k_cache_row},
                            {k_batch, k_head, k_row},
                            half,
                            dim - 2 * half},
                           {static_cast<T*>(v_cache),
                            static_cast<const T*>(v),
                            {v_cache_page, v_cache_head, v_cache_row},
                            {v_batch, v_head, v_row},
                            0,
                            v_dim},
                           lengths,
                           cache,
                           static_cast<const C*>(cos),
                           static_cast<const C*>(sin),
                           batch,
                           kv_heads,
                           seq,
                           positions,
                           cos_stride,
                           sin_stride};
      return launch_append(a, interleaved, stream);
    };
    if (table_dtype == DType::f32) return with(Type<float>{});
    return table_dtype == dtype ? with(t) : cudaErrorInvalidValue;
  });
}

}  // namespace tilewise
