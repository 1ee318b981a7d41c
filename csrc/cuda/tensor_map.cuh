// How the copy engine finds its way through a tensor: made on the host, passed to a kernel by value
// as `const __grid_constant__ CUtensorMap`.
#pragma once

#include "cuda/wgmma.cuh"

namespace tilewise {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                     const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                     const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's own function, asked for when first needed: the module loads without a driver.
inline cudaError_t find_encoder(EncodeTensorMap* encode) {
#ifdef TILEWISE_EMULATION
  *encode = cuTensorMapEncodeTiled;
#else
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query;
  constexpr unsigned kVersion = 12000;  // of CUDA, the first that has it
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              kVersion, cudaEnableDefault, &query);
  if (status != cudaSuccess) return status;
  if (query != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
  *encode = reinterpret_cast<EncodeTensorMap>(found);
#endif
  return cudaSuccess;
}

// Of a tensor at `base`, sizes innermost first; strides, in elements, of all dimensions but the
// innermost, whose elements are neighbours. A copy moves a `box`, whose rows are at most
// row_bytes(swizzle) long unless there is no swizzle.
template <int kRank>
cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const void* base,
                            const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                            const int (&box)[kRank], Swizzle swizzle) {
  EncodeTensorMap encode = nullptr;
  const cudaError_t status = find_encoder(&encode);
  if (status != cudaSuccess) return status;

  const auto type = dtype == DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  cuuint64_t extents[kRank], distances[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) distances[i - 1] = static_cast<cuuint64_t>(strides[i - 1] * bytes);
  }
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(base), extents, distances, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the two number their errors alike
}

}  // namespace tilewise
