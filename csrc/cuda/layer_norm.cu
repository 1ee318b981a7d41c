// LayerNorm: norm.cuh and norm_backward.cuh, with a mean.
#include "cuda/norm_launch.cuh"

namespace tilewise {

cudaError_t layer_norm_forward(void* y, float* mean, float* rstd, const void* x, const void* weight,
                               const void* bias, int64_t rows, int64_t cols, int64_t x_stride,
                               float eps, DType dtype, DType weight_dtype, cudaStream_t stream) {
  return norm_forward<true>(y, mean, rstd, x, weight, bias, rows, cols, x_stride, eps, dtype,
                            weight_dtype, stream);
}

cudaError_t layer_norm_backward(void* dx, void* dweight, void* dbias, float* dweight_parts,
                                float* dbias_parts, const void* dy, const void* x,
                                const void* weight, const float* mean, const float* rstd,
                                int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                                int64_t parts, DType dtype, DType weight_dtype,
                                cudaStream_t stream) {
  return norm_backward<true>(dx, dweight, dbias, weight ? dweight_parts : nullptr,
                             weight ? dbias_parts : nullptr, dy, x, weight, mean, rstd, rows, cols,
                             dy_stride, x_stride, parts, dtype, weight_dtype, stream);
}

}  // namespace tilewise
