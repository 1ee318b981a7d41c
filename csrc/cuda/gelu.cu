// GELU: each element is read once and written once.
#include "cuda/activation.cuh"
#include "cuda/dropout.cuh"
#include "cuda/elements.cuh"
#include "cuda/parts.cuh"

namespace tilewise {
namespace {

template <int kWidth, Activation kActivation, typename T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(T* y, const T* x, Elements elements, int64_t y_stride, int64_t x_stride) {
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    float v[kWidth];
    load(v, x + row * x_stride + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = activate<kActivation>(v[i]).value;
    store(y + row * y_stride + col, v);
  });
}

template <int kWidth, Activation kActivation, typename T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(T* dx, const T* dy, const T* x, Elements elements, int64_t dx_stride,
                    int64_t dy_stride, int64_t x_stride) {
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    float d[kWidth], v[kWidth];
    load(d, dy + row * dy_stride + col);
    load(v, x + row * x_stride + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) d[i] *= activate<kActivation>(v[i]).slope;
    store(dx + row * dx_stride + col, d);
  });
}

// y = dropout(gelu(x + bias)).
template <bool kWide, Activation kActivation, bool kDropout, typename T, typename B>
__global__ void __launch_bounds__(kElementThreads)
    bias_forward_kernel(T* y, const T* x, const B* bias, Elements elements, int64_t x_stride,
                        Dropout dropout) {
  constexpr int kWidth = kGroups<kWide, T>;
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    const int64_t left = elements.cols - col;
    float v[kWidth], b[kWidth];
    read<kWide>(v, x + row * x_stride + col, left);
    read<kWide>(b, bias + col, left);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = activate<kActivation>(v[i] + b[i]).value;
    if constexpr (kDropout) drop(v, dropout, row, col);
    write<kWide>(y + row * elements.cols + col, v, left);
  });
}

// A thread keeps to its columns, and sums one part of the rows; two rows are on the way at a time.
template <bool kWide, Activation kActivation, bool kDropout, typename T, typename B>
__global__ void __launch_bounds__(kElementThreads)
    bias_backward_kernel(T* dx, float* dbias_parts, const T* dy, const T* x, const B* bias,
                         Elements elements, int64_t rows, int64_t dy_stride, int64_t x_stride,
                         Dropout dropout) {
  constexpr int kWidth = kGroups<kWide, T>;
  constexpr int kRows = 2;
  const int64_t parts = elements.rows, cols = elements.cols;
  for_elements<kWidth>(elements, [&](int64_t part, int64_t col) {
    const int64_t left = cols - col;
    float b[kWidth], sum[kWidth] = {};
    read<kWide>(b, bias + col, left);
    for (int64_t first = part; first < rows; first += kRows * parts) {
      float d[kRows][kWidth], v[kRows][kWidth];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * parts;
        if (row >= rows) break;
        read<kWide>(d[r], dy + row * dy_stride + col, left);
        read<kWide>(v[r], x + row * x_stride + col, left);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * parts;
        if (row >= rows) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) d[r][i] *= activate<kActivation>(v[r][i] + b[i]).slope;
        if constexpr (kDropout) drop(d[r], dropout, row, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += d[r][i];
        if (dx) write<kWide>(dx + row * cols + col, d[r], left);
      }
    }
    if (dbias_parts) write<kWide>(dbias_parts + part * cols + col, sum, left);
  });
}

template <typename Body>
cudaError_t for_form(bool tanh, Body body) {
  return tanh ? body(ActivationOf<Activation::gelu_tanh>{})
              : body(ActivationOf<Activation::gelu>{});
}

}  // namespace

cudaError_t gelu_forward(void* y, const void* x, int64_t rows, int64_t cols, int64_t x_stride,
                         bool tanh, DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return for_form(tanh, [&](auto a) {
      const auto run = [&](auto width, int64_t begin, int64_t rows, int64_t count) {
        constexpr int kWidth = decltype(width)::value;
        const Elements elements = elements_of(rows, count, kWidth);
        return launch(forward_kernel<kWidth, decltype(a)::value, T>, elements.tiles,
                      elements.threads, 0, stream, static_cast<T*>(y) + begin,
                      static_cast<const T*>(x) + begin, elements, cols, x_stride);
      };
      return launch_elements<T>(rows, cols, addresses(y, x), run, x_stride);
    });
  });
}

cudaError_t gelu_backward(void* dx, const void* dy, const void* x, int64_t rows, int64_t cols,
                          int64_t dy_stride, int64_t x_stride, bool tanh, DType dtype,
                          cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return for_form(tanh, [&](auto a) {
      const auto run = [&](auto width, int64_t begin, int64_t rows, int64_t count) {
        constexpr int kWidth = decltype(width)::value;
        const Elements elements = elements_of(rows, count, kWidth);
        return launch(backward_kernel<kWidth, decltype(a)::value, T>, elements.tiles,
                      elements.threads, 0, stream, static_cast<T*>(dx) + begin,
                      static_cast<const T*>(dy) + begin, static_cast<const T*>(x) + begin, elements,
                      cols, dy_stride, x_stride);
      };
      return launch_elements<T>(rows, cols, addresses(dx, dy, x), run, dy_stride, x_stride);
    });
  });
}

cudaError_t bias_gelu_forward(void* y, const void* x, const void* bias, int64_t rows, int64_t cols,
                              int64_t x_stride, bool tanh, int64_t threshold, float scale,
                              const int64_t* seeds, const int64_t* offsets, int64_t seed_stride,
                              int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
                              DType bias_dtype, cudaStream_t stream) {
  const Dropout dropout{threshold, scale, seeds, offsets, seed_stride, offset_stride, seed, offset};
  return for_dtypes(dtype, bias_dtype, [&](auto t, auto b) {
    using T = typename decltype(t)::type;
    using B = typename decltype(b)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(y, x, bias), cols, x_stride);
    return for_form(tanh, [&](auto a) {
      return for_flags(wide, threshold > 0, [&](auto is_wide, auto drops) {
        constexpr bool kWide = decltype(is_wide)::value;
        const Elements elements = elements_of(rows, cols, kGroups<kWide, T>);
        return launch(bias_forward_kernel<kWide, decltype(a)::value, decltype(drops)::value, T, B>,
                      elements.tiles, elements.threads, 0, stream, static_cast<T*>(y),
                      static_cast<const T*>(x), static_cast<const B*>(bias), elements, x_stride,
                      dropout);
      });
    });
  });
}

cudaError_t bias_gelu_backward(void* dx, void* dbias, float* dbias_parts, const void* dy,
                               const void* x, const void* bias, int64_t rows, int64_t cols,
                               int64_t dy_stride, int64_t x_stride, int64_t parts, bool tanh,
                               int64_t threshold, float scale, const int64_t* seeds,
                               const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                               int64_t seed, int64_t offset, DType dtype, DType bias_dtype,
                               cudaStream_t stream) {
  const Dropout dropout{threshold, scale, seeds, offsets, seed_stride, offset_stride, seed, offset};
  return for_dtypes(dtype, bias_dtype, [&](auto t, auto b) {
    using T = typename decltype(t)::type;
    using B = typename decltype(b)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(dx, dbias_parts, dy, x, bias), cols,
                                                dy_stride, x_stride);
    const cudaError_t status = for_form(tanh, [&](auto a) {
      return for_flags(wide, threshold > 0, [&](auto is_wide, auto drops) {
        constexpr bool kWide = decltype(is_wide)::value;
        const Elements elements = elements_of(parts, cols, kGroups<kWide, T>);
        return launch(bias_backward_kernel<kWide, decltype(a)::value, decltype(drops)::value, T, B>,
                      elements.tiles, elements.threads, 0, stream, static_cast<T*>(dx), dbias_parts,
                      static_cast<const T*>(dy), static_cast<const T*>(x),
                      static_cast<const B*>(bias), elements, rows, dy_stride, x_stride, dropout);
      });
    });
    if (status != cudaSuccess || !dbias) return status;
    return column_sum(static_cast<B*>(dbias), dbias_parts, parts, cols, stream);
  });
}

}  // namespace tilewise
