// Threads that wait in a loop over memory: no function of the emulator is called there, and only
// the build "memory", which sees every access, lets others run meanwhile.
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kThreads = 64;

template <bool kBug>
__global__ void flag_that_nobody_sets(float* x) {
  TILEWISE_SHARED(flag, int[1]);
  if (threadIdx.x == 0) flag[0] = 0;
  __syncthreads();
  if (threadIdx.x == (kBug ? 1000 : 33)) flag[0] = 1;
  while (static_cast<volatile int&>(flag[0]) == 0) {  // found: flag_that_nobody_sets
  }
  x[threadIdx.x] += 1.f;
}

// Each half of the block says that it is there; with the bug, only after the other has.
template <bool kBug>
__global__ void flags_of_each_other(float* x, volatile int* flags) {
  const int half = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    if (!kBug) flags[half] = 1;
    while (flags[half ^ 1] == 0) {  // found: flags_of_each_other
    }
    if (kBug) flags[half] = 1;
  }
  __syncthreads();
  x[threadIdx.x] += 1.f;
}

// A loop that ends by itself, however long nobody else does anything.
template <bool kBug>
__global__ void loop_without_an_end(float* x, int n) {
  volatile float* mine = x + threadIdx.x;
  for (int i = 0; kBug || i < n; ++i) {  // found: loop_without_an_end
    if (*mine < 0.f) return;             // found: loop_without_an_end
  }
  *mine = *mine + 1.f;
}

std::vector<float> one_more() {
  std::vector<float> expected = ramp(kThreads);
  for (float& value : expected) value += 1.f;
  return expected;
}

template <void (*kKernel)(float*)>
bool adds_one() {
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, 0, x.at()) && x.equals(one_more());
}

template <void (*kKernel)(float*, volatile int*)>
bool meets() {
  const Device<float> x(ramp(kThreads));
  const Device<int> flags(std::vector<int>{0, 0});
  return run(kKernel, 1, kThreads, 0, x.at(), flags.at()) && x.equals(one_more());
}

template <void (*kKernel)(float*, int)>
bool counts() {
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, 0, x.at(), 20000) && x.equals(one_more());
}

}  // namespace

const std::vector<Seed> kSpins{
    {"flag_that_nobody_sets", adds_one<flag_that_nobody_sets<true>>,
     adds_one<flag_that_nobody_sets<false>>},
    {"flags_of_each_other", meets<flags_of_each_other<true>>, meets<flags_of_each_other<false>>},
    {"loop_without_an_end", counts<loop_without_an_end<true>>, counts<loop_without_an_end<false>>},
};

}  // namespace seeded
