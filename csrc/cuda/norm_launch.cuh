// The launchers that RMSNorm and LayerNorm have in common.
#pragma once

#include "cuda/norm_backward.cuh"
#include "cuda/row_launch.cuh"

namespace tilewise {

// Accesses that a thread holds: of x; of x and the residual, fewer if that is twice as wide; of dy
// and x; of dy, dsum and the sum.
template <bool kAdds, typename T, typename R>
constexpr int kForwardHeld = !kAdds                  ? 8
                             : sizeof(R) > sizeof(T) ? 2
                                                     : 4;
template <bool kAdds>
constexpr int kBackwardHeld = kAdds ? 2 : 4;

constexpr int64_t kReservedBytes = 4096;  // of shared memory, for a team's inboxes

// Call body with the types of x and of what x is added to: the same, or fp32. Where nothing is
// added there is only the first.
template <bool kAdds, typename Body>
cudaError_t for_streams(DType dtype, DType residual_dtype, DType weight_dtype, Body body) {
  if (weight_dtype != dtype && weight_dtype != DType::f32) return cudaErrorInvalidValue;
  if constexpr (kAdds) {
    return for_dtypes(dtype, residual_dtype, body);
  } else {
    return for_dtype(dtype, [&](auto t) { return body(t, t); });
  }
}

inline bool is_aligned(const Places& places, int width) {
  return places.outer_stride % width == 0 && places.middle_stride % width == 0 &&
         places.inner_stride % width == 0;
}

// One stride from row to row.
inline Places even(int64_t rows, int64_t stride) { return {1, rows, 0, 0, stride}; }

namespace {

template <bool kCentred, bool kAdds>
cudaError_t norm_forward(NormForward norm, DType residual_dtype, DType dtype, DType weight_dtype,
                         cudaStream_t stream) {
  norm.weight.is_single = norm.bias.is_single = weight_dtype == DType::f32;
  return for_streams<kAdds>(dtype, residual_dtype, weight_dtype, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using R = typename decltype(s)::type;
    constexpr int kHeld = kForwardHeld<kAdds, T, R>;
    const bool wide = can_vectorise<kVector<T>>(addresses(norm.y, norm.sum, norm.x, norm.residual,
                                                          norm.weight.at, norm.bias.at),
                                                norm.cols, norm.residual_stride) &&
                      is_aligned(norm.places, kVector<T>);
    const Rows rows = rows_of<T>(norm.rows, norm.cols, kHeld, wide);
    norm.blocks = rows.layout.blocks;
    norm.once = rows.once;
    return for_held<kHeld, !kAdds>(rows, [&](auto held, auto exact) {
      return launch_rows(norm_forward_kernel<kCentred, kAdds, T, R, held.value, exact.value>,
                         rows.layout, norm.rows, 0, stream, norm);
    });
  });
}

template <bool kCentred, bool kAdds>
cudaError_t norm_backward(NormBackward norm, void* dweight, void* dbias, DType residual_dtype,
                          DType dtype, DType weight_dtype, cudaStream_t stream) {
  constexpr int kHeld = kBackwardHeld<kAdds>;
  norm.weight.is_single = weight_dtype == DType::f32;
  return for_streams<kAdds>(dtype, residual_dtype, weight_dtype, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using R = typename decltype(s)::type;
    const bool wide = can_vectorise<kVector<T>>(
                          addresses(norm.dx, norm.dresidual, norm.weight_parts, norm.bias_parts,
                                    norm.dy, norm.dsum, norm.x, norm.weight.at),
                          norm.cols, norm.dy_stride, norm.dsum_stride) &&
                      is_aligned(norm.places, kVector<T>);
    const Rows rows = rows_of<T>(norm.rows, norm.cols, kHeld, wide);
    const int arrays = (norm.weight_parts ? 1 : 0) + (norm.bias_parts ? 1 : 0);
    const int64_t shared = column_sums_bytes(rows.layout, kHeld, kVector<T>, arrays);
    norm.blocks = rows.layout.blocks;
    norm.in_shared = shared + kReservedBytes <= machine().shared_bytes;
    norm.is_steady = norm.parts >= norm.rows || norm.parts * norm.cols % kVector<T> == 0;
    norm.once = rows.once;
    const cudaError_t status = for_held<kHeld, false>(rows, [&](auto held, auto exact) {
      return launch_rows(norm_backward_kernel<kCentred, kAdds, T, R, held.value, exact.value>,
                         rows.layout, norm.parts * rows.layout.rows, norm.in_shared ? shared : 0,
                         stream, norm);
    });
    if (status != cudaSuccess) return status;
    const auto add_parts = [&](auto* out, auto* second_out) {
      return column_sums(out, second_out, norm.weight_parts, norm.bias_parts, norm.parts, norm.cols,
                         stream);
    };
    return norm.weight.is_single
               ? add_parts(static_cast<float*>(dweight), static_cast<float*>(dbias))
               : add_parts(static_cast<T*>(dweight), static_cast<T*>(dbias));
  });
}

}  // namespace

}  // namespace tilewise
