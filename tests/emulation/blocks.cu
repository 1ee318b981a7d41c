// What blocks share: they run in any order, and at the same time.
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kThreads = 32;
constexpr int kGrid = 4;

// out[i] = the sum of the blocks' numbers.
template <bool kBug>
__global__ void sum_without_an_atomic(float* out, const float* x) {
  const float v = x[blockIdx.x * kThreads + threadIdx.x];
  if (kBug) {
    out[threadIdx.x] += v;  // found: sum_without_an_atomic
  } else {
    atomicAdd(&out[threadIdx.x], v);
  }
}

enum class Fence { kNone, kOfBlock, kOfDevice };

void fence(Fence which) {
  if (which == Fence::kOfBlock) __threadfence_block();
  if (which == Fence::kOfDevice) __threadfence();
}

// The last block to come adds what all have left: each must have seen it.
__device__ void leave_and_add(float* out, float* left, unsigned* tickets, const float* x,
                              Fence which) {
  if (threadIdx.x == 0) {
    left[blockIdx.x] = x[blockIdx.x * kThreads];
    fence(which);
    if (atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1) {
      fence(which);
      float sum = 0.f;
      for (unsigned i = 0; i < gridDim.x; ++i) sum += left[i];  // found: missing_fence block_fence
      *out = sum;
    }
  }
}

template <bool kBug>
__global__ void missing_fence(float* out, float* left, unsigned* tickets, const float* x) {
  leave_and_add(out, left, tickets, x, kBug ? Fence::kNone : Fence::kOfDevice);
}

template <bool kBug>
__global__ void block_fence(float* out, float* left, unsigned* tickets, const float* x) {
  leave_and_add(out, left, tickets, x, kBug ? Fence::kOfBlock : Fence::kOfDevice);
}

// Every block takes the numbers of the next one, of which it cannot know whether it has begun.
template <bool kBug>
__global__ void read_of_another_block(float* out, float* x) {
  const int me = blockIdx.x * kThreads + threadIdx.x;
  const int from = kBug ? (me + kThreads) % (kGrid * kThreads) : me;
  out[me] = x[from] * 0.f;  // found: read_of_another_block
  x[me] = 1.f;
}

template <void (*kKernel)(float*, const float*)>
bool adds() {
  std::vector<float> expected(kThreads);
  for (int i = 0; i < kGrid * kThreads; ++i) expected[i % kThreads] += static_cast<float>(i);
  const Device<float> x(ramp(kGrid * kThreads)), out(std::vector<float>(kThreads, 0.f));
  return run(kKernel, kGrid, kThreads, 0, out.at(), x.at()) && out.equals(expected);
}

template <void (*kKernel)(float*, float*, unsigned*, const float*)>
bool adds_last() {
  const Device<float> x(ramp(kGrid * kThreads)), out(std::vector<float>(1, 0.f));
  const Device<float> left(std::vector<float>(kGrid, 0.f));
  const Device<unsigned> tickets(std::vector<unsigned>(1, 0));
  return run(kKernel, kGrid, kThreads, 0, out.at(), left.at(), tickets.at(), x.at()) &&
         out.equals({6.f * kThreads});
}

template <void (*kKernel)(float*, float*)>
bool copies() {
  const size_t all = kGrid * kThreads;
  const Device<float> x(ramp(all)), out(all);
  return run(kKernel, kGrid, kThreads, 0, out.at(), x.at()) &&
         out.equals(std::vector<float>(all, 0.f));
}

}  // namespace

const std::vector<Seed> kBlocks{
    {"sum_without_an_atomic", adds<sum_without_an_atomic<true>>,
     adds<sum_without_an_atomic<false>>},
    {"missing_fence", adds_last<missing_fence<true>>, adds_last<missing_fence<false>>},
    {"block_fence", adds_last<block_fence<true>>, adds_last<block_fence<false>>},
    {"read_of_another_block", copies<read_of_another_block<true>>,
     copies<read_of_another_block<false>>},
};

}  // namespace seeded
