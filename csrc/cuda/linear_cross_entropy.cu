// Cross-entropy of linear logits: what is left to do in backward. The products are the caller's,
// and what happens between them is in cross_entropy.cu.
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace tilewise {
namespace {

constexpr int kThreads = 256;

// x *= factor, and nothing at all where that is 1, as it nearly always is.
template <int kWidth, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(T* x, const float* factor, int64_t count) {
  const float f = *factor;
  if (f == 1.f) return;
  const int64_t step = gridDim.x * int64_t{kThreads} * kWidth;
  for (int64_t at = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kWidth; at < count;
       at += step) {
    float v[kWidth];
    load(v, x + at);
#pragma unroll
    for (float& value : v) value *= f;
    store(x + at, v);
  }
}

}  // namespace

cudaError_t linear_cross_entropy_backward(void* x, const float* factor, int64_t count, DType dtype,
                                          cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(x), count);
    const int64_t each = kThreads * int64_t{wide ? kVector<T> : 1};
    return launch(wide ? backward_kernel<kVector<T>, T> : backward_kernel<1, T>,
                  (count + each - 1) / each, dim3(kThreads), 0, stream, static_cast<T*>(x), factor,
                  count);
  });
}

}  // namespace tilewise
