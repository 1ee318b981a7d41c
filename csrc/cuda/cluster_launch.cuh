// Launches with what only Hopper has: blocks in clusters, and all of an SM's shared memory.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.cuh"

namespace tilewise {

// Let a kernel have so much dynamic shared memory. The driver is told once of a kernel on a device,
// and again when it is more: what another thread was promised is never taken back.
inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  constexpr int64_t kNeedsNoLeave = 48 * 1024;
  if (bytes <= kNeedsNoLeave) return cudaSuccess;
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard<std::mutex> guard(lock);
  int64_t& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) most = bytes;
  return status;
}

// Launch kernel on `blocks` blocks, a multiple of `cluster`, of which each `cluster` run together.
template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int cluster,
                            dim3 threads, int64_t shared, cudaStream_t stream,
                            std::common_type_t<Parameters>... arguments) {
  const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (status != cudaSuccess) return status;
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
