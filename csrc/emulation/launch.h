// Launches, checked as a driver checks them.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>

#include "emulation/runtime.h"

namespace tilewise::emulation {

// The array of a block that belongs to `key`.
template <typename T>
T& shared_array(const void* key, const char* name, Place place = Place::here()) {
  return *static_cast<T*>(shared(key, name, sizeof(T), alignof(T), place));
}

cudaError_t checked_launch(const cudaLaunchConfig_t& configuration, const void* kernel,
                           const std::function<void()>& body);

}  // namespace tilewise::emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration,
                               void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto body = [&] { kernel(Parameters(arguments)...); };
  return tilewise::emulation::checked_launch(*configuration, reinterpret_cast<const void*>(kernel),
                                             body);
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}

// What one multiprocessor can hold by threads and shared memory; registers are not known here.
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...),
                                                          int threads, size_t shared_bytes) {
  const size_t by_shared = shared_bytes ? tilewise::emulation::kMaxSharedBytes / shared_bytes : 32;
  const size_t by_threads = threads > 0 ? 2048 / static_cast<size_t>(threads) : 0;
  *blocks = static_cast<int>(by_shared < by_threads ? by_shared : by_threads);
  return cudaSuccess;
}
