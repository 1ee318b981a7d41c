// What the seeded kernels share: each has a bug that a macro puts in, beside its clean twin.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <utility>
#include <vector>

// Launch a kernel and print how it went.
template <typename... Parameters, typename... Arguments>
bool run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
         Arguments... arguments) {
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared;
  const cudaError_t status = cudaLaunchKernelEx(&configuration, kernel, arguments...);
  if (status != cudaSuccess) std::printf("failed: %s\n", cudaGetErrorString(status));
  return status == cudaSuccess;
}

// Memory of the device with these values, never given back.
template <typename T>
T* device(const std::vector<T>& values) {
  T* memory = nullptr;
  cudaMalloc(&memory, values.size() * sizeof(T));
  cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return memory;
}

// Whether the values there are the ones expected; prints which are not.
template <typename T>
bool equal(const T* memory, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(memory[i] == expected[i])) {
      std::printf("wrong: element %zu is %g and must be %g\n", i, double(memory[i]),
                  double(expected[i]));
      return false;
    }
  }
  return true;
}
