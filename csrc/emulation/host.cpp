// The host's side of CUDA's runtime.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "emulation/launch.h"
#include "emulation/written.h"

namespace {

using namespace tilewise::emulation;

constexpr int kHopper = 9;

thread_local cudaError_t last_error = cudaSuccess;

std::mutex limits_lock;
std::map<const void*, size_t> dynamic_limits;  // what cudaFuncSetAttribute allowed

size_t dynamic_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_lock);
  const auto found = dynamic_limits.find(kernel);
  return found == dynamic_limits.end() ? kDefaultSharedBytes : found->second;
}

// The major architecture that launchers are to believe in: Hopper's, or that of a GPU before it.
int played_major() {
  const char* major = std::getenv("TILEWISE_EMULATION_MAJOR");
  return major ? std::atoi(major) : kHopper;
}

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool is_valid(const Shape& shape) {
  const dim3 g = shape.grid, b = shape.block, c = shape.cluster;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{c.x} * c.y * c.z;
  return g.x && g.y && g.z && g.x <= INT32_MAX && g.y <= 65535 && g.z <= 65535 && threads &&
         threads <= kMaxBlockThreads && b.z <= 64 && blocks && blocks <= 16 && g.x % c.x == 0 &&
         g.y % c.y == 0 && g.z % c.z == 0;
}

}  // namespace

namespace tilewise::emulation {

cudaError_t checked_launch(const cudaLaunchConfig_t& configuration, const void* kernel,
                           const std::function<void()>& body) {
  Shape shape{configuration.gridDim, configuration.blockDim, dim3(),
              configuration.dynamicSmemBytes};
  for (unsigned i = 0; i < configuration.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = configuration.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      shape.cluster = dim3(cluster.x, cluster.y, cluster.z);
    }
  }
  if (!is_valid(shape)) return returned(cudaErrorInvalidConfiguration);
  if (shape.shared_bytes > dynamic_limit(kernel)) return returned(cudaErrorInvalidValue);
  return returned(launch(shape, kernel, body) ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace tilewise::emulation

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return *report() ? report() : "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return returned(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

// A device does not change, and launchers remember what it said: another architecture is another
// device, with the number of its own.
cudaError_t cudaGetDevice(int* device) {
  *device = played_major() == kHopper ? 0 : played_major();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  int current = 0;
  cudaGetDevice(&current);
  if (device != 0 && device != current) return returned(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "emulated");
  properties->totalGlobalMem = size_t{1} << 36;
  properties->sharedMemPerBlock = kDefaultSharedBytes;
  properties->sharedMemPerBlockOptin = kMaxSharedBytes;
  properties->warpSize = kLanes;
  properties->maxThreadsPerBlock = kMaxBlockThreads;
  properties->multiProcessorCount = 4;
  properties->major = device ? device : kHopper;
  properties->l2CacheSize = 1 << 25;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kDefaultSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMaxSharedBytes; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  constexpr size_t kAlignment = 256;
  *memory = nullptr;
  if (bytes && posix_memalign(memory, kAlignment, bytes))
    return returned(cudaErrorMemoryAllocation);
  if (bytes) std::memset(*memory, 0xFF, bytes);  // NaN, where a GPU would have anything at all
  if (bytes) remember_allocation(*memory, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  forget_allocation(memory);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  copied(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  if (bytes) std::memset(memory, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, byte, bytes);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxSharedBytes) {
    return returned(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(limits_lock);
  dynamic_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
