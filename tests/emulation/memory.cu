// Accesses outside of arrays, misaligned ones, and of what nobody wrote.
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kThreads = 64;

template <bool kBug>
__global__ void global_one_past_the_end(float* x, int n) {
  for (int i = threadIdx.x; kBug ? i <= n : i < n; i += kThreads) {
    x[i] += 1.f;  // found: global_one_past_the_end
  }
}

template <bool kBug>
__global__ void index_outside_of_a_shared_array(float* x, int n) {
  TILEWISE_SHARED(held, float[kThreads]);
  if (threadIdx.x < kThreads) held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x) + (kBug ? n - kThreads + 1 : 0);
  x[threadIdx.x] = held[i] + 1.f;  // found: index_outside_of_a_shared_array
}

template <bool kBug>
__global__ void write_past_dynamic_shared_memory(float* x, int n) {
  TILEWISE_DYNAMIC_SHARED(held, float);
  for (int i = threadIdx.x; kBug ? i <= n : i < n; i += kThreads) {
    held[i] = 1.f;  // found: write_past_dynamic_shared_memory
  }
  __syncthreads();
  x[threadIdx.x] += held[threadIdx.x];
}

template <bool kBug>
__global__ void misaligned_vector_load(float* x, int n) {
  const int i = static_cast<int>(threadIdx.x) * 4 + (kBug ? 1 : 0);
  if (i + 4 > n) return;
  float4 four = *reinterpret_cast<float4*>(x + i);  // found: misaligned_vector_load
  four.x += 1.f, four.y += 1.f, four.z += 1.f, four.w += 1.f;
  *reinterpret_cast<float4*>(x + i) = four;
}

// Only half of what is read was written.
template <bool kBug>
__global__ void uninitialised_shared_memory(float* x, int n) {
  TILEWISE_SHARED(held, float[kThreads]);
  if (threadIdx.x < static_cast<unsigned>(kBug ? n / 2 : n)) held[threadIdx.x] = 1.f;
  __syncthreads();
  x[threadIdx.x] += held[threadIdx.x];  // found: uninitialised_shared_memory
}

template <bool kBug>
__global__ void too_much_shared_memory(float* x, int n) {
  TILEWISE_DYNAMIC_SHARED(held, float);
  held[threadIdx.x] = 1.f;
  if (static_cast<int>(threadIdx.x) < n) x[threadIdx.x] += held[threadIdx.x];
}

template <void (*kKernel)(float*, int), int kShared = 0>
bool adds_one() {
  std::vector<float> expected = ramp(kThreads);
  for (float& value : expected) value += 1.f;
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, kShared, x.at(), kThreads) && x.equals(expected);
}

}  // namespace

const std::vector<Seed> kMemory{
    {"global_one_past_the_end", adds_one<global_one_past_the_end<true>>,
     adds_one<global_one_past_the_end<false>>},
    {"index_outside_of_a_shared_array", adds_one<index_outside_of_a_shared_array<true>>,
     adds_one<index_outside_of_a_shared_array<false>>},
    {"write_past_dynamic_shared_memory",
     adds_one<write_past_dynamic_shared_memory<true>, kThreads * sizeof(float)>,
     adds_one<write_past_dynamic_shared_memory<false>, kThreads * sizeof(float)>},
    {"misaligned_vector_load", adds_one<misaligned_vector_load<true>>,
     adds_one<misaligned_vector_load<false>>},
    {"uninitialised_shared_memory", adds_one<uninitialised_shared_memory<true>>,
     adds_one<uninitialised_shared_memory<false>>},
    {"too_much_shared_memory", adds_one<too_much_shared_memory<true>, 49 * 1024>,
     adds_one<too_much_shared_memory<false>, 48 * 1024>},
};

}  // namespace seeded
