// QK norm and rotary embedding: a head is read twice, the second time from L1.
#include "cuda/elements.cuh"
#include "cuda/growing_sums.cuh"
#include "cuda/rotation.cuh"

namespace tilewise {
namespace {

// What q has, and k has of its own.
template <typename T, typename W>
struct Side {
  T* out;       // turned, or its gradient turned back
  float* rstd;  // [batch, heads, seq]
  const T *d, *x;
  const W* weight;
  float* weight_parts;
  int64_t heads;
  Strides out_strides, d_strides, x_strides;
};

template <typename C>
struct Turning {
  int64_t batch, seq, dim, half;
  const C *cos, *sin;
  int64_t cos_stride, sin_stride;
  Positions positions;
  float eps, weight_offset;
};

// Over the lanes of a row, on every one of them.
__device__ inline float lanes_sum(float v) {
  const unsigned lanes = blockDim.x, lane = (threadIdx.y * lanes + threadIdx.x) % kWarpSize;
  const unsigned mine =
      lanes == kWarpSize ? 0xffffffffu : ((1u << lanes) - 1) << (lane & ~(lanes - 1));
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(mine, v, distance);
  }
  return v;
}

template <int kWidth, typename W>
__device__ void load_weight(float (&w)[kWidth], const W* weight, float weight_offset) {
  load(w, weight);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) w[i] += weight_offset;
}

template <int kWidth, bool kInterleaved, typename W>
__device__ void load_weights(float (&v)[kWidth], float (&w)[kWidth], const W* weight, int64_t pair,
                             int64_t half, float weight_offset) {
  load_pairs<kWidth, kInterleaved>(v, w, weight, pair, half);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] += weight_offset, w[i] += weight_offset;
}

template <int kWidth, bool kInterleaved, typename T, typename W, typename C>
__device__ void forward_row(const Side<T, W>& side, const Turning<C>& turning, int64_t b, int64_t h,
                            int64_t s) {
  const Place place = place_of(turning.positions, b, s);
  const int64_t half = turning.half, rest = turning.dim - 2 * half;
  const T* x = side.x + side.x_strides.at(b, h, s);
  T* y = side.out + side.out_strides.at(b, h, s);
  const float scale = place.is_row ? 1.f : 0.f;

  float square_sum = 0.f;
  for_pairs<kWidth>(turning.dim, [&](int64_t col) {
    float v[kWidth];
    load(v, x + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) square_sum += v[i] * v[i];
  });
  const float r = rsqrtf(lanes_sum(square_sum) / turning.dim + turning.eps);
  if (threadIdx.x == 0) {
    side.rstd[(b * side.heads + h) * turning.seq + s] = place.is_row ? r : 0.f;
  }

  for_pairs<kWidth>(half, [&](int64_t pair) {
    float u[kWidth], v[kWidth], wu[kWidth], wv[kWidth], cos[kWidth], sin[kWidth];
    load_pairs<kWidth, kInterleaved>(u, v, x, pair, half);
    load_weights<kWidth, kInterleaved>(wu, wv, side.weight, pair, half, turning.weight_offset);
    load_angles(cos, sin, turning.cos + place.position * turning.cos_stride + pair,
                turning.sin + place.position * turning.sin_stride + pair, place.is_known, 1.f);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] *= r * wu[i], v[i] *= r * wv[i];
    turn(u, v, cos, sin);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      u[i] = scale == 0.f ? 0.f : u[i];
      v[i] = scale == 0.f ? 0.f : v[i];
    }
    store_pairs<kWidth, kInterleaved>(y, u, v, pair, half);
  });
  for_pairs<kWidth>(rest, [&](int64_t col) {
    float v[kWidth], w[kWidth];
    load(v, x + 2 * half + col);
    load_weight(w, side.weight + 2 * half + col, turning.weight_offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = scale == 0.f ? 0.f : v[i] * r * w[i];
    store(y + 2 * half + col, v);
  });
}

template <int kWidth, bool kInterleaved, typename T, typename W, typename C>
__global__ void __launch_bounds__(kRotationThreads, kRotationBlocks)
    forward_kernel(Side<T, W> q, Side<T, W> k, Turning<C> turning) {
  const int64_t all = q.heads + k.heads, rows = turning.batch * turning.seq * all;
  const int64_t step = gridDim.x * int64_t{blockDim.y};
  for (int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y; row < rows; row += step) {
    const int64_t token = divide(row, all), b = divide(token, turning.seq);
    const int64_t head = row - token * all, s = token - b * turning.seq;
    if (head < q.heads) {
      forward_row<kWidth, kInterleaved>(q, turning, b, head, s);
    } else {
      forward_row<kWidth, kInterleaved>(k, turning, b, head - q.heads, s);
    }
  }
}

// dx = rstd * (g - xhat * mean(g * xhat)), with xhat = x * rstd and g = weight * the gradient
// turned back. sums: of this row's lanes, [dim], to which the gradient of the weight is added.
template <int kWidth, bool kInterleaved, typename T, typename W, typename C>
__device__ void backward_row(float* sums, const Side<T, W>& side, const Turning<C>& turning,
                             int64_t b, int64_t h, int64_t s) {
  const Place place = place_of(turning.positions, b, s);
  const int64_t half = turning.half, rest = turning.dim - 2 * half;
  const T* x = side.x + side.x_strides.at(b, h, s);
  const T* d = side.d + side.d_strides.at(b, h, s);
  T* dx = side.out ? side.out + side.out_strides.at(b, h, s) : nullptr;
  const float r = side.rstd[(b * side.heads + h) * turning.seq + s];
  const C* cos_row = turning.cos + place.position * turning.cos_stride;
  const C* sin_row = turning.sin + place.position * turning.sin_stride;

  float dot = 0.f;
  for_pairs<kWidth>(place.is_row ? half : 0, [&](int64_t pair) {
    float u[kWidth], v[kWidth], wu[kWidth], wv[kWidth], gu[kWidth], gv[kWidth];
    float cos[kWidth], sin[kWidth];
    load_pairs<kWidth, kInterleaved>(u, v, x, pair, half);
    load_pairs<kWidth, kInterleaved>(gu, gv, d, pair, half);
    load_weights<kWidth, kInterleaved>(wu, wv, side.weight, pair, half, turning.weight_offset);
    load_angles(cos, sin, cos_row + pair, sin_row + pair, place.is_known, -1.f);
    turn(gu, gv, cos, sin);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      gu[i] *= u[i] * r, gv[i] *= v[i] * r;
      dot += gu[i] * wu[i] + gv[i] * wv[i];
    }
    if (side.weight_parts) {  // where a lane's own pairs lie does not matter, but for the order
      add(sums + 2 * pair, gu);
      add(sums + 2 * pair + kWidth, gv);
    }
  });
  for_pairs<kWidth>(place.is_row ? rest : 0, [&](int64_t col) {
    float v[kWidth], w[kWidth], g[kWidth];
    load(v, x + 2 * half + col);
    load(g, d + 2 * half + col);
    load_weight(w, side.weight + 2 * half + col, turning.weight_offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g[i] *= v[i] * r;
      dot += g[i] * w[i];
    }
    if (side.weight_parts) add(sums + 2 * half + col, g);
  });
  if (!dx) return;
  const float mean = lanes_sum(dot) / turning.dim;

  for_pairs<kWidth>(half, [&](int64_t pair) {
    float u[kWidth] = {}, v[kWidth] = {}, wu[kWidth], wv[kWidth], gu[kWidth], gv[kWidth];
    float cos[kWidth], sin[kWidth];
    if (place.is_row) {
      load_pairs<kWidth, kInterleaved>(u, v, x, pair, half);
      load_pairs<kWidth, kInterleaved>(gu, gv, d, pair, half);
      load_weights<kWidth, kInterleaved>(wu, wv, side.weight, pair, half, turning.weight_offset);
      load_angles(cos, sin, cos_row + pair, sin_row + pair, place.is_known, -1.f);
      turn(gu, gv, cos, sin);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        u[i] = r * (gu[i] * wu[i] - u[i] * r * mean);
        v[i] = r * (gv[i] * wv[i] - v[i] * r * mean);
      }
    }
    store_pairs<kWidth, kInterleaved>(dx, u, v, pair, half);
  });
  for_pairs<kWidth>(rest, [&](int64_t col) {
    float v[kWidth] = {}, w[kWidth], g[kWidth];
    if (place.is_row) {
      load(v, x + 2 * half + col);
      load(g, d + 2 * half + col);
      load_weight(w, side.weight + 2 * half + col, turning.weight_offset);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = r * (g[i] * w[i] - v[i] * r * mean);
    }
    store(dx + 2 * half + col, v);
  });
}

// The rows of one of `parts` blocks, whose sums are then added in order.
template <int kWidth, bool kInterleaved, typename T, typename W, typename C>
__device__ void backward_part(const Side<T, W>& side, const Turning<C>& turning, int64_t part,
                              int64_t parts) {
  float* sums = dynamic_shared() + threadIdx.y * turning.dim;
  for (int64_t col = threadIdx.x; col < turning.dim; col += blockDim.x) sums[col] = 0.f;
  __syncthreads();

  const int64_t rows = turning.batch * turning.seq * side.heads;
  const int64_t step = parts * blockDim.y;
  for (int64_t row = part * blockDim.y + threadIdx.y; row < rows; row += step) {
    const int64_t token = divide(row, side.heads), b = divide(token, turning.seq);
    backward_row<kWidth, kInterleaved>(sums, side, turning, b, row - token * side.heads,
                                       token - b * turning.seq);
  }

  __syncthreads();
  if (!side.weight_parts) return;
  for (int64_t at = threadIdx.y * blockDim.x + threadIdx.x; at < turning.dim;
       at += blockDim.x * blockDim.y) {
    float sum = 0.f;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += dynamic_shared()[y * turning.dim + at];
    // A slot holds its first elements, then its second ones: back to where these belong.
    int64_t col = at;
    if (at < 2 * turning.half) {
      const int64_t pair = at / (2 * kWidth) * kWidth + at % kWidth, second = at / kWidth % 2;
      col = kInterleaved ? 2 * pair + second : pair + second * turning.half;
    }
    side.weight_parts[part * turning.dim + col] = sum;
  }
}

// The first q_parts blocks work on q, the others on k.
template <int kWidth, bool kInterleaved, typename T, typename W, typename C>
__global__ void __launch_bounds__(kRotationThreads, kRotationBlocks)
    backward_kernel(Side<T, W> q, Side<T, W> k, Turning<C> turning, int64_t q_parts,
                    int64_t k_parts) {
  if (blockIdx.x < q_parts) {
    backward_part<kWidth, kInterleaved>(q, turning, blockIdx.x, q_parts);
  } else {
    backward_part<kWidth, kInterleaved>(k, turning, blockIdx.x - q_parts, k_parts);
  }
}

}  // namespace

cudaError_t qk_norm_rotary_forward(
    void* q_turned, void* k_turned, float* q_rstd, float* k_rstd, const void* q, const void* k,
    const void* q_weight, const void* k_weight, const void* cos, const void* sin, int64_t batch,
    int64_t heads, int64_t kv_heads, int64_t seq, int64_t dim, int64_t half, int64_t q_turned_batch,
    int64_t q_turned_head, int64_t q_turned_seq, int64_t k_turned_batch, int64_t k_turned_head,
    int64_t k_turned_seq, int64_t q_batch, int64_t q_head, int64_t q_seq, int64_t k_batch,
    int64_t k_head, int64_t k_seq, int64_t cos_stride, int64_t sin_stride, const int64_t* ids,
    int64_t ids_batch, int64_t ids_seq, const int32_t* ends, int64_t sequences, int64_t offset,
    int64_t positions, bool interleaved, float eps, float weight_offset, DType dtype,
    DType weight_dtype, DType table_dtype, cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto weight) {
    return for_dtypes(dtype, table_dtype, [&](auto, auto table) {
      using T = typename decltype(t)::type;
      using W = typename decltype(weight)::type;
      using C = typename decltype(table)::type;
      constexpr int kWide = kVector<T>;
      const bool wide = can_vectorise<kWide>(
          addresses(q_turned, k_turned, q, k, q_weight, k_weight, cos, sin), half, dim,
          q_turned_batch, q_turned_head, q_turned_seq, k_turned_batch, k_turned_head, k_turned_seq,
          q_batch, q_head, q_seq, k_batch, k_head, k_seq, cos_stride, sin_stride);
      const auto kernel = wide          ? interleaved ? forward_kernel<kWide, true, T, W, C>
                                                      : forward_kernel<kWide, false, T, W, C>
                          : interleaved ? forward_kernel<1, true, T, W, C>
                                        : forward_kernel<1, false, T, W, C>;
      const Side<T, W> q_side{static_cast<T*>(q_turned),
                              q_rstd,
                              nullptr,
                              static_cast<const T*>(q),
                              static_cast<const W*>(q_weight),
                              nullptr,
                              heads,
                              {q_turned_batch, q_turned_head, q_turned_seq},
                              {},
                              {q_batch, q_head, q_seq}};
      const Side<T, W> k_side{static_cast<T*>(k_turned),
                              k_rstd,
                              nullptr,
                              static_cast<const T*>(k),
                              static_cast<const W*>(k_weight),
                              nullptr,
                              kv_heads,
                              {k_turned_batch, k_turned_head, k_turned_seq},
                              {},
                              {k_batch, k_head, k_seq}};
      const Turning<C> turning{batch,
                               seq,
                               dim,
                               half,
                               static_cast<const C*>(cos),
                               static_cast<const C*>(sin),
                               cos_stride,
                               sin_stride,
                               {ids, ids_batch, ids_seq, ends, sequences, offset, positions},
                               eps,
                               weight_offset};
      const dim3 threads = lanes_for(half, dim - 2 * half, wide ? kWide : 1);
      const int64_t rows = batch * seq * (heads + kv_heads);
      return launch(kernel, (rows + threads.y - 1) / threads.y, threads, 0, stream, q_side, k_side,
                    turning);
    });
  });
}

cudaError_t qk_norm_rotary_backward(
    void* dq, void* dk, void* dq_weight, void* dk_weight, float* q_weight_parts,
    float* k_weight_parts, const void* dq_turned, const void* dk_turned, const void* q,
    const void* k, const void* q_weight, const void* k_weight, const void* cos, const void* sin,
    float* q_rstd, float* k_rstd, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq,
    int64_t dim, int64_t half, int64_t dq_batch, int64_t dq_head, int64_t dq_seq, int64_t dk_batch,
    int64_t dk_head, int64_t dk_seq, int64_t dq_turned_batch, int64_t dq_turned_head,
    int64_t dq_turned_seq, int64_t dk_turned_batch, int64_t dk_turned_head, int64_t dk_turned_seq,
    int64_t q_batch, int64_t q_head, int64_t q_seq, int64_t k_batch, int64_t k_head, int64_t k_seq,
    int64_t cos_stride, int64_t sin_stride, const int64_t* ids, int64_t ids_batch, int64_t ids_seq,
    const int32_t* ends, int64_t sequences, int64_t offset, int64_t positions, int64_t q_parts,
    int64_t k_parts, bool interleaved, float weight_offset, DType dtype, DType weight_dtype,
    DType table_dtype, cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto weight) {
    using W = typename decltype(weight)::type;
    cudaError_t status = for_dtypes(dtype, table_dtype, [&](auto, auto table) {
      using T = typename decltype(t)::type;
      using C = typename decltype(table)::type;
      constexpr int kWide = kVector<T>;
      const bool wide = can_vectorise<kWide>(
          addresses(dq, dk, dq_turned, dk_turned, q, k, q_weight, k_weight, cos, sin), half, dim,
          dq_batch, dq_head, dq_seq, dk_batch, dk_head, dk_seq, dq_turned_batch, dq_turned_head,
          dq_turned_seq, dk_turned_batch, dk_turned_head, dk_turned_seq, q_batch, q_head, q_seq,
          k_batch, k_head, k_seq, cos_stride, sin_stride);
      const auto kernel = wide          ? interleaved ? backward_kernel<kWide, true, T, W, C>
                                                      : backward_kernel<kWide, false, T, W, C>
                          : interleaved ? backward_kernel<1, true, T, W, C>
                                        : backward_kernel<1, false, T, W, C>;
      const Side<T, W> q_side{static_cast<T*>(dq),
                              q_rstd,
                              static_cast<const T*>(dq_turned),
                              static_cast<const T*>(q),
                              static_cast<const W*>(q_weight),
                              q_weight_parts,
                              heads,
                              {dq_batch, dq_head, dq_seq},
                              {dq_turned_batch, dq_turned_head, dq_turned_seq},
                              {q_batch, q_head, q_seq}};
      const Side<T, W> k_side{static_cast<T*>(dk),
                              k_rstd,
                              static_cast<const T*>(dk_turned),
                              static_cast<const T*>(k),
                              static_cast<const W*>(k_weight),
                              k_weight_parts,
                              kv_heads,
                              {dk_batch, dk_head, dk_seq},
                              {dk_turned_batch, dk_turned_head, dk_turned_seq},
                              {k_batch, k_head, k_seq}};
      const Turning<C> turning{batch,
                               seq,
                               dim,
                               half,
                               static_cast<const C*>(cos),
                               static_cast<const C*>(sin),
                               cos_stride,
                               sin_stride,
                               {ids, ids_batch, ids_seq, ends, sequences, offset, positions},
                               0.f,
                               weight_offset};
      dim3 threads = lanes_for(half, dim - 2 * half, wide ? kWide : 1);
      constexpr int64_t kMostShared = 48 * 1024;  // that a block has without asking
      while (threads.y > 1 && threads.y * dim * int64_t{sizeof(float)} > kMostShared)
        threads.y /= 2;
      const int64_t shared = threads.y * dim * int64_t{sizeof(float)};
      return launch(kernel, q_parts + k_parts, threads, shared, stream, q_side, k_side, turning,
                    q_parts, k_parts);
    });
    if (status == cudaSuccess && dq_weight) {
      status = column_sum(static_cast<W*>(dq_weight), q_weight_parts, q_parts, dim, stream);
    }
    if (status == cudaSuccess && dk_weight) {
      status = column_sum(static_cast<W*>(dk_weight), k_weight_parts, k_parts, dim, stream);
    }
    return status;
  });
}

}  // namespace tilewise
