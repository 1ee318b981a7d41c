// Softmax: a row is read three times, all but the first from L1 if it fits there.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace tilewise {
namespace {

// y = exp(t - m) / sum(exp(t - m)), or its logarithm, with t = scale * x and m = max(t).
template <int kWidth, bool kLog, typename T>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    forward_kernel(T* y, const T* x, int64_t rows, int64_t cols, int64_t x_stride, float scale) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const T* x_row = x + row * x_stride;
    T* y_row = y + row * cols;

    float top = -INFINITY;
    for_columns<kWidth>(cols, [&](int64_t col) {
      float t[kWidth];
      load(t, x_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) top = fmaxf(top, t[i] * scale);
    });
    const float m = row_maximum(top);

    float part = 0.f;
    for_columns<kWidth>(cols, [&](int64_t col) {
      float t[kWidth];
      load(t, x_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) part += expf(t[i] * scale - m);
    });
    const float sum = row_sum(part);  // NaN where x has NaN or inf, or nothing but -inf
    const float log_sum = kLog ? logf(sum) : 0.f;

    for_columns<kWidth>(cols, [&](int64_t col) {
      float t[kWidth];
      load(t, x_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        t[i] = t[i] * scale - m;
        t[i] = kLog ? t[i] - log_sum : expf(t[i]) / sum;
      }
      store(y_row + col, t);
    });
  }
}

// dx = scale * y * (dy - sum(dy * y)), or of the logarithm: scale * (dy - exp(y) * sum(dy)).
template <int kWidth, bool kLog, typename T>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    backward_kernel(T* dx, const T* dy, const T* y, int64_t rows, int64_t cols, int64_t dy_stride,
                    int64_t y_stride, float scale) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const T* dy_row = dy + row * dy_stride;
    const T* y_row = y + row * y_stride;
    T* dx_row = dx + row * cols;

    float sum = 0.f;
    for_columns<kWidth>(cols, [&](int64_t col) {
      float g[kWidth], p[kWidth];
      load(g, dy_row + col);
      if constexpr (!kLog) load(p, y_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += kLog ? g[i] : g[i] * p[i];
    });
    const float dot = row_sum(sum);

    for_columns<kWidth>(cols, [&](int64_t col) {
      float g[kWidth], p[kWidth];
      load(g, dy_row + col);
      load(p, y_row + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        g[i] = scale * (kLog ? g[i] - expf(p[i]) * dot : p[i] * (g[i] - dot));
      }
      store(dx_row + col, g);
    });
  }
}

template <int kWidth, typename T>
auto forward_for(bool log) {
  return log ? forward_kernel<kWidth, true, T> : forward_kernel<kWidth, false, T>;
}

template <int kWidth, typename T>
auto backward_for(bool log) {
  return log ? backward_kernel<kWidth, true, T> : backward_kernel<kWidth, false, T>;
}

}  // namespace

cudaError_t softmax_forward(void* y, const void* x, int64_t rows, int64_t cols, int64_t x_stride,
                            float scale, bool log, DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(y, x), cols, x_stride);
    const dim3 threads = threads_for(cols, wide ? kVector<T> : 1);
    return launch(wide ? forward_for<kVector<T>, T>(log) : forward_for<1, T>(log),
                  blocks_for(rows, threads), threads, 0, stream, static_cast<T*>(y),
                  static_cast<const T*>(x), rows, cols, x_stride, scale);
  });
}

cudaError_t softmax_backward(void* dx, const void* dy, const void* y, int64_t rows, int64_t cols,
                             int64_t dy_stride, int64_t y_stride, float scale, bool log,
                             DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(dx, dy, y), cols, dy_stride, y_stride);
    const dim3 threads = threads_for(cols, wide ? kVector<T> : 1);
    return launch(wide ? backward_for<kVector<T>, T>(log) : backward_for<1, T>(log),
                  blocks_for(rows, threads), threads, 0, stream, static_cast<T*>(dx),
                  static_cast<const T*>(dy), static_cast<const T*>(y), rows, cols, dy_stride,
                  y_stride, scale);
  });
}

}  // namespace tilewise
