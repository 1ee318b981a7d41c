// LayerNorm, alone and after an addition: norm.cuh and norm_backward.cuh, with a mean.
#include "cuda/norm_launch.cuh"

namespace tilewise {

cudaError_t layer_norm_forward(void* y, float* mean, float* rstd, const void* x, const void* weight,
                               const void* bias, int64_t rows, int64_t cols, int64_t x_middle,
                               int64_t x_inner, int64_t x_outer_stride, int64_t x_middle_stride,
                               int64_t x_stride, float eps, float weight_offset, bool llama,
                               DType dtype, DType weight_dtype, cudaStream_t stream) {
  const NormForward norm{y,
                         nullptr,
                         mean,
                         rstd,
                         x,
                         nullptr,
                         {weight, false},
                         {bias, false},
                         {x_middle, x_inner, x_outer_stride, x_middle_stride, x_stride},
                         rows,
                         cols,
                         0,
                         eps,
                         weight_offset,
                         llama,
                         {},
                         1,
                         false};
  return norm_forward<true, false>(norm, dtype, dtype, weight_dtype, stream);
}

cudaError_t layer_norm_backward(void* dx, void* dweight, void* dbias, float* dweight_parts,
                                float* dbias_parts, const void* dy, const void* x,
                                const void* weight, const float* mean, const float* rstd,
                                int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_middle,
                                int64_t x_inner, int64_t x_outer_stride, int64_t x_middle_stride,
                                int64_t x_stride, int64_t parts, float weight_offset, DType dtype,
                                DType weight_dtype, cudaStream_t stream) {
  const NormBackward norm{dx,
                          nullptr,
                          dweight_parts,
                          dbias_parts,
                          dy,
                          nullptr,
                          x,
                          {weight, false},
                          mean,
                          rstd,
                          {x_middle, x_inner, x_outer_stride, x_middle_stride, x_stride},
                          rows,
                          cols,
                          dy_stride,
                          0,
                          parts,
                          weight_offset,
                          {},
                          1,
                          false,
                          false,
                          false};
  return norm_backward<true, false>(norm, dweight, dbias, dtype, dtype, weight_dtype, stream);
}

cudaError_t add_layer_norm_forward(void* y, void* sum, float* mean, float* rstd, const void* x,
                                   const void* residual, const void* weight, const void* bias,
                                   int64_t rows, int64_t cols, int64_t x_stride,
                                   int64_t residual_stride, float eps, float weight_offset,
                                   bool llama, int64_t threshold, float scale, const int64_t* seeds,
                                   const int64_t* offsets, int64_t seed_stride,
                                   int64_t offset_stride, int64_t seed, int64_t offset,
                                   DType residual_dtype, DType dtype, DType weight_dtype,
                                   cudaStream_t stream) {
  const Dropout dropout{threshold, scale, seeds, offsets, seed_stride, offset_stride, seed, offset};
  const NormForward norm{y,
                         sum,
                         mean,
                         rstd,
                         x,
                         residual,
                         {weight, false},
                         {bias, false},
                         even(rows, x_stride),
                         rows,
                         cols,
                         residual_stride,
                         eps,
                         weight_offset,
                         llama,
                         dropout,
                         1,
                         false};
  return norm_forward<true, true>(norm, residual_dtype, dtype, weight_dtype, stream);
}

cudaError_t add_layer_norm_backward(
    void* dx, void* dresidual, void* dweight, void* dbias, float* dweight_parts, float* dbias_parts,
    const void* dy, const void* dsum, const void* sum, const void* weight, const float* mean,
    const float* rstd, int64_t rows, int64_t cols, int64_t dy_stride, int64_t dsum_stride,
    int64_t parts, float weight_offset, int64_t threshold, float scale, const int64_t* seeds,
    const int64_t* offsets, int64_t seed_stride, int64_t offset_stride, int64_t seed,
    int64_t offset, DType residual_dtype, DType dtype, DType weight_dtype, cudaStream_t stream) {
  const Dropout dropout{threshold, scale, seeds, offsets, seed_stride, offset_stride, seed, offset};
  const NormBackward norm{dx,
                          dresidual,
                          dweight_parts,
                          dbias_parts,
                          dy,
                          dsum,
                          sum,
                          {weight, false},
                          mean,
                          rstd,
                          even(rows, cols),
                          rows,
                          cols,
                          dy_stride,
                          dsum_stride,
                          parts,
                          weight_offset,
                          dropout,
                          1,
                          false,
                          false,
                          false};
  return norm_backward<true, true>(norm, dweight, dbias, residual_dtype, dtype, weight_dtype,
                                   stream);
}

}  // namespace tilewise
