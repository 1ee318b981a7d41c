// Barriers that are missing, or not met by all.
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kThreads = 64;

// Reverse what the threads of a block hold.
template <bool kBug>
__global__ void missing_barrier_before_read(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  held[threadIdx.x] = x[threadIdx.x];
  if (!kBug) __syncthreads();
  x[threadIdx.x] = held[kThreads - 1 - threadIdx.x];  // found: missing_barrier_before_read
}

// Turn right by one, twice.
template <bool kBug>
__global__ void missing_barrier_before_reuse(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  float v = x[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    held[threadIdx.x] = v;  // found: missing_barrier_before_reuse
    __syncthreads();
    v = held[(threadIdx.x + kThreads - 1) % kThreads];
    if (!kBug) __syncthreads();
  }
  x[threadIdx.x] = v;
}

template <bool kBug>
__global__ void divergent_barrier(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  held[threadIdx.x] = x[threadIdx.x];
  if (kBug && threadIdx.x < 7) {
    __syncthreads();  // found: divergent_barrier
  } else {
    __syncthreads();  // found: divergent_barrier
  }
  x[threadIdx.x] = held[threadIdx.x ^ 1];
}

template <bool kBug>
__global__ void return_before_barrier(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  if (kBug && threadIdx.x >= 50) return;
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();  // found: return_before_barrier
  x[threadIdx.x] = held[threadIdx.x ^ 1];
}

void named_barrier(int id, int threads, Place place = Place::here()) {
  tilewise::emulation::sync_named(id, threads, "bar.sync", place);
}

// Each half of a block of 128 threads reverses its own numbers, held in its own half.
template <bool kBug>
__global__ void overlapping_named_barriers(float* x) {
  TILEWISE_SHARED(held, float[2 * kThreads]);
  const int half = threadIdx.x / kThreads, begin = half * kThreads, i = threadIdx.x % kThreads;
  held[threadIdx.x] = x[threadIdx.x];
  named_barrier(kBug ? 1 : 1 + half, kThreads);
  x[threadIdx.x] = held[begin + kThreads - 1 - i];  // found: overlapping_named_barriers
}

template <bool kBug>
__global__ void named_barrier_of_other_count(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  held[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32) {
    named_barrier(3, kThreads);  // found: named_barrier_of_other_count
  } else {
    named_barrier(3, kBug ? 32 : kThreads);  // found: named_barrier_of_other_count
  }
  x[threadIdx.x] = held[threadIdx.x ^ 1];
}

template <bool kBug>
__global__ void wait_for_nobody(float* x) {
  TILEWISE_SHARED(ready, unsigned[1]);
  if (threadIdx.x == 0) atomicExch(&ready[0], 0u);
  __syncthreads();
  if (threadIdx.x == 1 && !kBug) atomicExch(&ready[0], 1u);
  if (threadIdx.x == 0) {
    while (atomicAdd(&ready[0], 0u) == 0) {  // found: wait_for_nobody
    }
  }
  x[threadIdx.x] += 1.f;
}

std::vector<float> reversed(int blocks = 1) {
  std::vector<float> values = ramp(kThreads * blocks);
  for (int i = 0; i < kThreads * blocks; ++i) {
    values[i] = static_cast<float>(i / kThreads * kThreads + kThreads - 1 - i % kThreads);
  }
  return values;
}

std::vector<float> neighbours() {
  std::vector<float> values = ramp(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = static_cast<float>(i ^ 1);
  return values;
}

template <void (*kKernel)(float*), int kHalves = 1>
bool reverses() {
  const Device<float> x(ramp(kThreads * kHalves));
  return run(kKernel, 1, kThreads * kHalves, 0, x.at()) && x.equals(reversed(kHalves));
}

template <void (*kKernel)(float*)>
bool swaps() {
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, 0, x.at()) && x.equals(neighbours());
}

template <void (*kKernel)(float*)>
bool turns() {
  std::vector<float> turned = ramp(kThreads);
  for (int i = 0; i < kThreads; ++i) turned[(i + 2) % kThreads] = static_cast<float>(i);
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, 0, x.at()) && x.equals(turned);
}

template <void (*kKernel)(float*)>
bool ends() {
  const Device<float> x(static_cast<size_t>(kThreads));
  return run(kKernel, 1, kThreads, 0, x.at());
}

}  // namespace

const std::vector<Seed> kBarriers{
    {"missing_barrier_before_read", reverses<missing_barrier_before_read<true>>,
     reverses<missing_barrier_before_read<false>>},
    {"missing_barrier_before_reuse", turns<missing_barrier_before_reuse<true>>,
     turns<missing_barrier_before_reuse<false>>},
    {"divergent_barrier", swaps<divergent_barrier<true>>, swaps<divergent_barrier<false>>},
    {"return_before_barrier", swaps<return_before_barrier<true>>,
     swaps<return_before_barrier<false>>},
    {"overlapping_named_barriers", reverses<overlapping_named_barriers<true>, 2>,
     reverses<overlapping_named_barriers<false>, 2>},
    {"named_barrier_of_other_count", swaps<named_barrier_of_other_count<true>>,
     swaps<named_barrier_of_other_count<false>>},
    {"wait_for_nobody", ends<wait_for_nobody<true>>, ends<wait_for_nobody<false>>},
};

}  // namespace seeded
