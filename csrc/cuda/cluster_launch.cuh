// Launches with what only Hopper has: blocks in clusters, and all of an SM's shared memory.
#pragma once

#include "cuda/launch.cuh"

namespace tilewise {

// Launch kernel on `blocks` blocks, a multiple of `cluster`, of which each `cluster` run together.
template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int cluster,
                            dim3 threads, int64_t shared, cudaStream_t stream,
                            std::common_type_t<Parameters>... arguments) {
  constexpr int64_t kNeedsNoLeave = 48 * 1024;
  if (shared > kNeedsNoLeave) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  if (cluster == 1) return launch(kernel, blocks, threads, shared, stream, arguments...);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace tilewise
