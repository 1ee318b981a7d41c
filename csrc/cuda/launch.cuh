// How kernels are launched and where their shared memory comes from. What C++ has no word for is
// a macro here: csrc/emulation/include/cuda_runtime.h has the same two for a machine without CUDA.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace tilewise {

#ifdef __CUDACC__

// TILEWISE_SHARED(sums, float[4][32]): an array that the threads of a block share.
template <typename T>
using Same = T;
#define TILEWISE_SHARED(name, ...) __shared__ tilewise::Same<__VA_ARGS__> name

// TILEWISE_DYNAMIC_SHARED(sums, float): a pointer to as much as the launch asked for.
#define TILEWISE_DYNAMIC_SHARED(name, type)                  \
  extern __shared__ __align__(1024) unsigned char dynamic[]; \
  type* name = reinterpret_cast<type*>(dynamic)

// Keep the compiler from knowing what is in a register: what it computed of it before, it computes
// again, instead of keeping that in registers for as long. The machine does nothing here.
__device__ __forceinline__ void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }

// 2^x, two units in the last place off at most; 0 instead of a subnormal number.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

inline void forget(uint32_t&) {}

inline float exp2_approximate(float x) { return exp2f(x); }

#endif

// Dynamic shared memory, aligned for 16-byte accesses.
__device__ inline float* dynamic_shared() {
  TILEWISE_DYNAMIC_SHARED(floats, float);
  return floats;
}

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// What the current device says of itself. It is asked once: a device does not change.
inline int attribute(cudaDeviceAttr asked) {
  constexpr int kDevices = 16, kAttributes = 128;
  static std::atomic<int> known[kDevices][kAttributes];  // a zero is asked for again
  const int device = current_device();
  const bool kept = device < kDevices && asked < kAttributes;
  int value = kept ? known[device][asked].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    cudaDeviceGetAttribute(&value, asked, device);
    if (kept) known[device][asked].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Launch kernel on at most as many blocks as a grid can have: it loops over the rest.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared,
                   cudaStream_t stream, std::common_type_t<Parameters>... arguments) {
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
  configuration.blockDim = threads;
  configuration.dynamicSmemBytes = static_cast<size_t>(shared);
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, arguments...);
}

}  // namespace tilewise
