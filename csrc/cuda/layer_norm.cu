// LayerNorm: a row is read three times, all but the first from L1. The variance is the mean square
// of the centred row: mean(x^2) - mean(x)^2 would cancel where the mean is large.
#include "cuda/parts.cuh"
#include "cuda/reduce.cuh"

namespace tilewise {
namespace {

template <int kWidth, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    forward_kernel(T* y, float* mean, float* rstd, const T* x, const W* weight, const W* bias,
                   int64_t rows, int64_t cols, int64_t x_stride, float eps) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const T* x_row = x + row * x_stride;
    T* y_row = y + row * cols;

    float sum = 0.f;
    for_columns<kWidth>(cols, [&](int64_t col) {
      float v[kWidth];
      load(v, x_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += v[i];
    });
    const float m = row_sum(sum) / cols;

    float square_sum = 0.f;
    for_columns<kWidth>(cols, [&](int64_t col) {
      float v[kWidth];
      load(v, x_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) square_sum += (v[i] - m) * (v[i] - m);
    });
    const float r = rsqrtf(row_sum(square_sum) / cols + eps);
    if (threadIdx.x == 0) {
      mean[row] = m;
      rstd[row] = r;
    }

    for_columns<kWidth>(cols, [&](int64_t col) {
      float v[kWidth], w[kWidth], b[kWidth];
      load(v, x_row + col);
      load_or(1.f, w, weight, col);
      load_or(0.f, b, bias, col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = (v[i] - m) * r * w[i] + b[i];
      store(y_row + col, v);
    });
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// with g = dy * weight and xhat = (x - mean) * rstd.
template <int kWidth, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    backward_kernel(T* dx, float* dweight_parts, float* dbias_parts, const T* dy, const T* x,
                    const W* weight, const float* mean, const float* rstd, int64_t rows,
                    int64_t cols, int64_t dy_stride, int64_t x_stride, int64_t parts,
                    bool in_shared) {
  const int64_t part = first_row();
  if (part >= parts) return;
  float* dweight = growing_sums(dweight_parts, part, cols, in_shared, 0);
  float* dbias = growing_sums(dbias_parts, part, cols, in_shared, 1);
  if (weight) {
    clear<kWidth>(dweight, cols);
    clear<kWidth>(dbias, cols);
  }

  for (int64_t row = part; row < rows; row += parts) {
    const T* dy_row = dy + row * dy_stride;
    const T* x_row = x + row * x_stride;
    T* dx_row = dx + row * cols;
    const float m = mean[row], r = rstd[row];

    float sums[2] = {};  // of g, and of g * xhat
    for_columns<kWidth>(cols, [&](int64_t col) {
      float g[kWidth], v[kWidth], w[kWidth];
      load(g, dy_row + col);
      load(v, x_row + col);
      load_or(1.f, w, weight, col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sums[0] += g[i] * w[i];
        sums[1] += g[i] * w[i] * ((v[i] - m) * r);
      }
    });
    row_reduce(sums, Sum{});
    const float mean_g = sums[0] / cols, mean_gxhat = sums[1] / cols;

    for_columns<kWidth>(cols, [&](int64_t col) {
      float g[kWidth], v[kWidth], w[kWidth], gxhat[kWidth];
      load(g, dy_row + col);
      load(v, x_row + col);
      load_or(1.f, w, weight, col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float xhat = (v[i] - m) * r;
        gxhat[i] = g[i] * xhat;
        v[i] = r * (g[i] * w[i] - mean_g - xhat * mean_gxhat);
      }
      store(dx_row + col, v);
      if (weight) {
        add(dweight + col, gxhat);
        add(dbias + col, g);
      }
    });
  }

  if (weight && in_shared) {
    copy<kWidth>(dweight_parts + part * cols, dweight, cols);
    copy<kWidth>(dbias_parts + part * cols, dbias, cols);
  }
}

}  // namespace

cudaError_t layer_norm_forward(void* y, float* mean, float* rstd, const void* x, const void* weight,
                               const void* bias, int64_t rows, int64_t cols, int64_t x_stride,
                               float eps, DType dtype, DType weight_dtype, cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(y, x, weight, bias), cols, x_stride);
    const auto kernel = wide ? forward_kernel<kVector<T>, T, W> : forward_kernel<1, T, W>;
    const dim3 threads = threads_for(cols, wide ? kVector<T> : 1);
    return launch(kernel, blocks_for(rows, threads), threads, 0, stream, static_cast<T*>(y), mean,
                  rstd, static_cast<const T*>(x), static_cast<const W*>(weight),
                  static_cast<const W*>(bias), rows, cols, x_stride, eps);
  });
}

cudaError_t layer_norm_backward(void* dx, void* dweight, void* dbias, float* dweight_parts,
                                float* dbias_parts, const void* dy, const void* x,
                                const void* weight, const float* mean, const float* rstd,
                                int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                                int64_t parts, DType dtype, DType weight_dtype,
                                cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const bool wide = can_vectorise<kVector<T>>(
        addresses(dx, dweight_parts, dbias_parts, dy, x, weight), cols, dy_stride, x_stride);
    const auto kernel = wide ? backward_kernel<kVector<T>, T, W> : backward_kernel<1, T, W>;
    cudaError_t status = launch_parts(
        kernel, weight ? 2 : 0, parts, cols, threads_for(cols, wide ? kVector<T> : 1), stream,
        static_cast<T*>(dx), dweight_parts, dbias_parts, static_cast<const T*>(dy),
        static_cast<const T*>(x), static_cast<const W*>(weight), mean, rstd, rows, cols, dy_stride,
        x_stride, parts);
    if (status != cudaSuccess || !weight) return status;
    status = column_sum(static_cast<W*>(dweight), dweight_parts, parts, cols, stream);
    if (status != cudaSuccess) return status;
    return column_sum(static_cast<W*>(dbias), dbias_parts, parts, cols, stream);
  });
}

}  // namespace tilewise
