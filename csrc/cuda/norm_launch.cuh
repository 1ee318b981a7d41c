// The launchers that RMSNorm and LayerNorm have in common.
#pragma once

#include "cuda/norm_backward.cuh"
#include "cuda/row_launch.cuh"

namespace tilewise {

constexpr int kForwardHeld = 8;   // of x
constexpr int kBackwardHeld = 4;  // of x, and of dy

constexpr int64_t kReservedBytes = 4096;  // of shared memory, for a team's inboxes

// Whether a parameter of one dtype can be beside an x of the other.
inline bool is_parameter(DType parameter, DType dtype) {
  return parameter == dtype || parameter == DType::f32;
}

template <bool kCentred>
cudaError_t norm_forward(void* y, float* mean, float* rstd, const void* x, const void* weight,
                         const void* bias, int64_t rows, int64_t cols, int64_t x_stride, float eps,
                         DType dtype, DType weight_dtype, cudaStream_t stream) {
  if (!is_parameter(weight_dtype, dtype)) return cudaErrorInvalidValue;
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(y, x, weight, bias), cols, x_stride);
    const Rows taken = rows_of<T>(rows, cols, kForwardHeld, wide);
    const bool is_single = weight_dtype == DType::f32;
    const NormForward<T> norm{static_cast<T*>(y),
                              mean,
                              rstd,
                              static_cast<const T*>(x),
                              {weight, is_single},
                              {bias, is_single},
                              rows,
                              cols,
                              x_stride,
                              eps,
                              taken.layout.blocks,
                              taken.once};
    return for_held<kForwardHeld, true>(taken, [&](auto held, auto exact) {
      return launch_rows(norm_forward_kernel<kCentred, T, held.value, exact.value>, taken.layout,
                         rows, 0, stream, norm);
    });
  });
}

template <bool kCentred>
cudaError_t norm_backward(void* dx, void* dweight, void* dbias, float* weight_parts,
                          float* bias_parts, const void* dy, const void* x, const void* weight,
                          const float* mean, const float* rstd, int64_t rows, int64_t cols,
                          int64_t dy_stride, int64_t x_stride, int64_t parts, DType dtype,
                          DType weight_dtype, cudaStream_t stream) {
  if (!is_parameter(weight_dtype, dtype)) return cudaErrorInvalidValue;
  return for_dtype(dtype, [&](auto t) -> cudaError_t {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(
        addresses(dx, weight_parts, bias_parts, dy, x, weight), cols, dy_stride, x_stride);
    const Rows taken = rows_of<T>(rows, cols, kBackwardHeld, wide);
    const int arrays = (weight_parts ? 1 : 0) + (bias_parts ? 1 : 0);
    int64_t shared = column_sums_bytes(taken.layout, kBackwardHeld, kVector<T>, arrays);
    const bool in_shared = shared + kReservedBytes <= machine().shared_bytes;
    if (!in_shared) shared = 0;
    const bool is_steady = parts >= rows || parts * cols % kVector<T> == 0;
    const NormBackward<T> norm{static_cast<T*>(dx),
                               weight_parts,
                               bias_parts,
                               static_cast<const T*>(dy),
                               static_cast<const T*>(x),
                               {weight, weight_dtype == DType::f32},
                               mean,
                               rstd,
                               rows,
                               cols,
                               dy_stride,
                               x_stride,
                               parts,
                               taken.layout.blocks,
                               in_shared,
                               is_steady,
                               taken.once};
    const cudaError_t status = for_held<kBackwardHeld, false>(taken, [&](auto held, auto exact) {
      return launch_rows(norm_backward_kernel<kCentred, T, held.value, exact.value>, taken.layout,
                         parts * taken.layout.rows, shared, stream, norm);
    });
    if (status != cudaSuccess) return status;
    const auto add_parts = [&](auto* out, auto* second_out) {
      return column_sums(out, second_out, weight_parts, bias_parts, parts, cols, stream);
    };
    return norm.weight.is_single
               ? add_parts(static_cast<float*>(dweight), static_cast<float*>(dbias))
               : add_parts(static_cast<T*>(dweight), static_cast<T*>(dbias));
  });
}

}  // namespace tilewise
