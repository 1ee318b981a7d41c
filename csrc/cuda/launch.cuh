// How kernels are launched: the only file with <<<>>> in it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace tilewise {

// Dynamic shared memory, aligned for 16-byte accesses.
__device__ inline float* dynamic_shared() {
  extern __shared__ __align__(16) float dynamic[];
  return dynamic;
}

// Launch kernel on at most as many blocks as a grid can have: it loops over the rest.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared,
                   cudaStream_t stream, std::common_type_t<Parameters>... arguments) {
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX));
  kernel<<<grid, threads, static_cast<size_t>(shared), stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace tilewise
