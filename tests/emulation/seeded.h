// Kernels with a bug each, beside the same kernel without: `run<true>` has it. The line where it
// must be found has the comment "found: <name>".
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

namespace seeded {

using tilewise::emulation::Place;

// Whether the numbers came out right; each is run in several orders.
using Test = bool (*)();

struct Seed {
  const char* name;
  Test with_bug;
  Test clean;
};

extern const std::vector<Seed> kBarriers;
extern const std::vector<Seed> kWarps;
extern const std::vector<Seed> kMemory;
extern const std::vector<Seed> kBlocks;
extern const std::vector<Seed> kWritten;
extern const std::vector<Seed> kSpins;  // of which even the clean need the build "memory"

int conversions();

// Launch a kernel and say so if it fails.
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

// Memory of the device with these values; who tests for overruns wants it exactly as long.
template <typename T>
class Device {
 public:
  explicit Device(const std::vector<T>& values) : count_(values.size()) {
    cudaMalloc(&memory_, count_ * sizeof(T));
    cudaMemcpy(memory_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  explicit Device(size_t count) : Device(std::vector<T>(count)) {}
  ~Device() { cudaFree(memory_); }
  Device(const Device&) = delete;

  T* at() const { return memory_; }

  bool equals(const std::vector<T>& expected) const {
    for (size_t i = 0; i < count_; ++i) {
      if (!(memory_[i] == expected[i])) {
        std::printf("wrong: element %zu is %g and must be %g\n", i, static_cast<double>(memory_[i]),
                    static_cast<double>(expected[i]));
        return false;
      }
    }
    return true;
  }

 private:
  size_t count_;
  T* memory_ = nullptr;
};

// 0, 1, 2, ...
inline std::vector<float> ramp(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  return values;
}

}  // namespace seeded
