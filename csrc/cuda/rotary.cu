// Rotary embedding: the heads of q and of k in one launch, any strides, each element read once.
#include "cuda/elements.cuh"
#include "cuda/rotation.cuh"

namespace tilewise {
namespace {

struct Heads {
  int64_t batch, heads, kv_heads, seq, half, rest;
};

template <int kWidth, bool kInterleaved, typename T, typename C>
__device__ void turn_row(T* y, const T* x, const C* cos, const C* sin, int64_t cos_stride,
                         int64_t sin_stride, const Heads& shape, const Place& place, float sign) {
  const float zeros[kWidth] = {};
  for_pairs<kWidth>(shape.half, [&](int64_t pair) {
    float a[kWidth], b[kWidth], c[kWidth], s[kWidth];
    if (!place.is_row) {
      store_pairs<kWidth, kInterleaved>(y, zeros, zeros, pair, shape.half);
      return;
    }
    load_pairs<kWidth, kInterleaved>(a, b, x, pair, shape.half);
    load_angles(c, s, cos + place.position * cos_stride + pair,
                sin + place.position * sin_stride + pair, place.is_known, sign);
    turn(a, b, c, s);
    store_pairs<kWidth, kInterleaved>(y, a, b, pair, shape.half);
  });
  for_pairs<kWidth>(shape.rest, [&](int64_t col) {
    float v[kWidth] = {};
    if (place.is_row) load(v, x + 2 * shape.half + col);
    store(y + 2 * shape.half + col, v);
  });
}

// sign: 1 forwards, -1 to turn back.
template <int kWidth, bool kInterleaved, typename T, typename C>
__global__ void __launch_bounds__(kRotationThreads)
    forward_kernel(T* q_turned, T* k_turned, const T* q, const T* k, const C* cos, const C* sin,
                   Heads shape, Strides q_turned_strides, Strides k_turned_strides,
                   Strides q_strides, Strides k_strides, int64_t cos_stride, int64_t sin_stride,
                   Positions positions, float sign) {
  const int64_t all = shape.heads + shape.kv_heads, rows = shape.batch * shape.seq * all;
  const int64_t step = gridDim.x * int64_t{blockDim.y};
  for (int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y; row < rows; row += step) {
    const int64_t token = divide(row, all), b = divide(token, shape.seq);
    const int64_t head = row - token * all, s = token - b * shape.seq;
    const Place place = place_of(positions, b, s);
    const bool is_q = head < shape.heads;
    const int64_t h = is_q ? head : head - shape.heads;
    T* y = is_q ? q_turned + q_turned_strides.at(b, h, s) : k_turned + k_turned_strides.at(b, h, s);
    const T* x = is_q ? q + q_strides.at(b, h, s) : k + k_strides.at(b, h, s);
    turn_row<kWidth, kInterleaved>(y, x, cos, sin, cos_stride, sin_stride, shape, place, sign);
  }
}

}  // namespace

cudaError_t rotary_forward(void* q_turned, void* k_turned, const void* q, const void* k,
                           const void* cos, const void* sin, int64_t batch, int64_t heads,
                           int64_t kv_heads, int64_t seq, int64_t dim, int64_t half,
                           int64_t q_turned_batch, int64_t q_turned_head, int64_t q_turned_seq,
                           int64_t k_turned_batch, int64_t k_turned_head, int64_t k_turned_seq,
                           int64_t q_batch, int64_t q_head, int64_t q_seq, int64_t k_batch,
                           int64_t k_head, int64_t k_seq, int64_t cos_stride, int64_t sin_stride,
                           const int64_t* ids, int64_t ids_batch, int64_t ids_seq,
                           const int32_t* ends, int64_t sequences, int64_t offset,
                           int64_t positions, bool interleaved, float sign, DType dtype,
                           DType table_dtype, cudaStream_t stream) {
  const Heads shape{batch, heads, kv_heads, seq, half, dim - 2 * half};
  const Positions places{ids, ids_batch, ids_seq, ends, sequences, offset, positions};
  return for_dtypes(dtype, table_dtype, [&](auto t, auto table) {
    using T = typename decltype(t)::type;
    using C = typename decltype(table)::type;
    constexpr int kWide = kVector<T>;
    const bool wide = can_vectorise<kWide>(
        addresses(q_turned, k_turned, q, k, cos, sin), half, shape.rest, q_turned_batch,
        q_turned_head, q_turned_seq, k_turned_batch, k_turned_head, k_turned_seq, q_batch, q_head,
        q_seq, k_batch, k_head, k_seq, cos_stride, sin_stride);
    const auto kernel =
        wide ? interleaved ? forward_kernel<kWide, true, T, C> : forward_kernel<kWide, false, T, C>
        : interleaved ? forward_kernel<1, true, T, C>
                      : forward_kernel<1, false, T, C>;
    const dim3 threads = lanes_for(half, shape.rest, wide ? kWide : 1);
    const int64_t rows = batch * seq * (heads + kv_heads);
    return launch(kernel, (rows + threads.y - 1) / threads.y, threads, 0, stream,
                  static_cast<T*>(q_turned), static_cast<T*>(k_turned), static_cast<const T*>(q),
                  static_cast<const T*>(k), static_cast<const C*>(cos), static_cast<const C*>(sin),
                  shape, Strides{q_turned_batch, q_turned_head, q_turned_seq},
                  Strides{k_turned_batch, k_turned_head, k_turned_seq},
                  Strides{q_batch, q_head, q_seq}, Strides{k_batch, k_head, k_seq}, cos_stride,
                  sin_stride, places, sign);
  });
}

}  // namespace tilewise
