// Dropout and a residual: each element is read once and written once.
#include "cuda/dropout.cuh"
#include "cuda/elements.cuh"

namespace tilewise {
namespace {

// y = residual + dropout(x).
template <bool kWide, typename T, typename Y>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(Y* y, const T* x, const Y* residual, Elements elements, int64_t x_stride,
                   int64_t residual_stride, Dropout dropout) {
  constexpr int kWidth = kGroups<kWide, T>;
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    const int64_t left = elements.cols - col;
    float v[kWidth], r[kWidth] = {};
    read<kWide>(v, x + row * x_stride + col, left);
    if (residual) read<kWide>(r, residual + row * residual_stride + col, left);
    drop(v, dropout, row, col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] += r[i];
    write<kWide>(y + row * elements.cols + col, v, left);
  });
}

}  // namespace

cudaError_t dropout_add_forward(void* y, const void* x, const void* residual, int64_t rows,
                                int64_t cols, int64_t x_stride, int64_t residual_stride,
                                int64_t threshold, float scale, const int64_t* seeds,
                                const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                                int64_t seed, int64_t offset, DType x_dtype, DType y_dtype,
                                cudaStream_t stream) {
  const Dropout dropout{threshold, scale, seeds, offsets, seed_stride, offset_stride, seed, offset};
  const auto run = [&](auto t, auto o) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(o)::type;
    const bool wide =
        can_vectorise<kVector<T>>(addresses(y, x, residual), cols, x_stride, residual_stride);
    const auto kernel = wide ? forward_kernel<true, T, Y> : forward_kernel<false, T, Y>;
    const Elements elements = elements_of(rows, cols, wide ? kGroups<true, T> : kGroups<false, T>);
    return launch(kernel, elements.tiles, elements.threads, 0, stream, static_cast<Y*>(y),
                  static_cast<const T*>(x), static_cast<const Y*>(residual), elements, x_stride,
                  residual_stride, dropout);
  };
  // Backwards, the gradient of a residual in fp32 becomes one of x in 16 bits.
  if (x_dtype == DType::f32) {
    return for_dtype(y_dtype, [&](auto o) { return run(Type<float>{}, o); });
  }
  return for_dtypes(x_dtype, y_dtype, run);
}

}  // namespace tilewise
