// Gated linear units: each element is read once and written once.
#include "cuda/activation.cuh"
#include "cuda/elements.cuh"

namespace tilewise {
namespace {

struct Clamp {
  float limit, alpha, inverse_alpha, up_offset;
};

// NaN is not beyond the limit, and stays.
__device__ float at_most(float limit, float gate) { return gate > limit ? limit : gate; }
__device__ float within(float limit, float up) {
  return up > limit ? limit : up < -limit ? -limit : up;
}

// y = activation(gate) * (up + up_offset).
template <int kWidth, Activation kActivation, typename T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(T* y, const T* gate, const T* up, Elements elements, int64_t y_stride,
                   int64_t gate_stride, int64_t up_stride, Clamp clamp) {
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    float g[kWidth], u[kWidth];
    load(g, gate + row * gate_stride + col);
    load(u, up + row * up_stride + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float t = clamp.alpha * at_most(clamp.limit, g[i]);
      g[i] = activate<kActivation>(t).value * clamp.inverse_alpha *
             (within(clamp.limit, u[i]) + clamp.up_offset);
    }
    store(y + row * y_stride + col, g);
  });
}

// What is beyond the limit has no gradient.
template <int kWidth, Activation kActivation, typename T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(T* dgate, T* dup, const T* dy, const T* gate, const T* up, Elements elements,
                    int64_t dgate_stride, int64_t dup_stride, int64_t dy_stride,
                    int64_t gate_stride, int64_t up_stride, Clamp clamp) {
  for_elements<kWidth>(elements, [&](int64_t row, int64_t col) {
    float d[kWidth], g[kWidth], u[kWidth];
    load(d, dy + row * dy_stride + col);
    load(g, gate + row * gate_stride + col);
    load(u, up + row * up_stride + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const ValueAndSlope a = activate<kActivation>(clamp.alpha * at_most(clamp.limit, g[i]));
      const float dg = d[i] * (within(clamp.limit, u[i]) + clamp.up_offset) * a.slope;
      const float du = d[i] * (a.value * clamp.inverse_alpha);
      g[i] = g[i] > clamp.limit ? 0.f : dg;
      u[i] = fabsf(u[i]) > clamp.limit ? 0.f : du;
    }
    if (dgate) store(dgate + row * dgate_stride + col, g);
    if (dup) store(dup + row * dup_stride + col, u);
  });
}

}  // namespace

cudaError_t glu_forward(void* y, const void* gate, const void* up, int64_t rows, int64_t cols,
                        int64_t gate_stride, int64_t up_stride, Activation activation, float limit,
                        float alpha, float up_offset, DType dtype, cudaStream_t stream) {
  const Clamp clamp{limit, alpha, 1.f / alpha, up_offset};
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return for_activation(activation, [&](auto a) {
      const auto run = [&](auto width, int64_t begin, int64_t rows, int64_t count) {
        constexpr int kWidth = decltype(width)::value;
        const Elements elements = elements_of(rows, count, kWidth);
        return launch(forward_kernel<kWidth, decltype(a)::value, T>, elements.tiles,
                      elements.threads, 0, stream, static_cast<T*>(y) + begin,
                      static_cast<const T*>(gate) + begin, static_cast<const T*>(up) + begin,
                      elements, cols, gate_stride, up_stride, clamp);
      };
      return launch_elements<T>(rows, cols, addresses(y, gate, up), run, gate_stride, up_stride);
    });
  });
}

cudaError_t glu_backward(void* dgate, void* dup, const void* dy, const void* gate, const void* up,
                         int64_t rows, int64_t cols, int64_t dgate_stride, int64_t dup_stride,
                         int64_t dy_stride, int64_t gate_stride, int64_t up_stride,
                         Activation activation, float limit, float alpha, float up_offset,
                         DType dtype, cudaStream_t stream) {
  const Clamp clamp{limit, alpha, 1.f / alpha, up_offset};
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return for_activation(activation, [&](auto a) {
      const auto run = [&](auto width, int64_t begin, int64_t rows, int64_t count) {
        constexpr int kWidth = decltype(width)::value;
        const Elements elements = elements_of(rows, count, kWidth);
        return launch(backward_kernel<kWidth, decltype(a)::value, T>, elements.tiles,
                      elements.threads, 0, stream, dgate ? static_cast<T*>(dgate) + begin : nullptr,
                      dup ? static_cast<T*>(dup) + begin : nullptr,
                      static_cast<const T*>(dy) + begin, static_cast<const T*>(gate) + begin,
                      static_cast<const T*>(up) + begin, elements, dgate_stride, dup_stride,
                      dy_stride, gate_stride, up_stride, clamp);
      };
      return launch_elements<T>(rows, cols, addresses(dgate, dup, dy, gate, up), run, dgate_stride,
                                dup_stride, dy_stride, gate_stride, up_stride);
    });
  });
}

}  // namespace tilewise
