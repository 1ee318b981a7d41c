// What lanes do together, and some of them do not.
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffff;

// The sum of a warp's numbers, on every lane.
template <bool kBug>
__global__ void reduction_without_a_step(float* x) {
  float v = x[threadIdx.x];
  for (int lane = kBug ? 8 : 16; lane > 0; lane /= 2) v += __shfl_xor_sync(kAll, v, lane);
  x[threadIdx.x] = v;
}

template <bool kBug>
__global__ void shuffle_in_a_branch(float* x) {
  float v = x[threadIdx.x];
  for (int lane = 16; lane > 0; lane /= 2) {
    if (!kBug || threadIdx.x < 31) {
      v += __shfl_xor_sync(kAll, v, lane);  // found: shuffle_in_a_branch
    }
  }
  x[threadIdx.x] = v;
}

template <bool kBug>
__global__ void shuffle_outside_of_the_mask(float* x) {
  float v = x[threadIdx.x];
  const unsigned mask = kBug ? 0x7fffffff : kAll;
  for (int lane = 16; lane > 0; lane /= 2) {
    v += __shfl_xor_sync(mask, v, lane);  // found: shuffle_outside_of_the_mask
  }
  x[threadIdx.x] = v;
}

// As above, but lane 31 has returned and the others add what it does not bring.
template <bool kBug>
__global__ void shuffle_with_a_lane_that_returned(float* x) {
  if (kBug && threadIdx.x == 31) return;
  float v = x[threadIdx.x];
  for (int lane = 16; lane > 0; lane /= 2) {
    v += __shfl_xor_sync(kAll, v, lane);  // found: shuffle_with_a_lane_that_returned
  }
  x[threadIdx.x] = v;
}

// Lanes of a warp run in step on no GPU since 2017.
template <bool kBug>
__global__ void missing_warp_barrier(float* x) {
  TILEWISE_SHARED(held, float[kLanes]);
  held[threadIdx.x] = x[threadIdx.x];
  if (!kBug) __syncwarp();
  x[threadIdx.x] = held[kLanes - 1 - threadIdx.x];  // found: missing_warp_barrier
}

// A shuffle makes lanes meet, and orders nothing that they wrote.
template <bool kBug>
__global__ void shuffle_as_a_barrier(float* x) {
  TILEWISE_SHARED(held, float[kLanes]);
  held[threadIdx.x] = x[threadIdx.x];
  if (kBug) {
    __shfl_sync(kAll, 0, 0);
  } else {
    __syncwarp();
  }
  x[threadIdx.x] = held[kLanes - 1 - threadIdx.x];  // found: shuffle_as_a_barrier
}

template <void (*kKernel)(float*)>
bool sums() {
  const Device<float> x(ramp(kLanes));
  return run(kKernel, 1, kLanes, 0, x.at()) && x.equals(std::vector<float>(kLanes, 496.f));
}

template <void (*kKernel)(float*)>
bool reverses() {
  std::vector<float> reversed = ramp(kLanes);
  for (int i = 0; i < kLanes; ++i) reversed[i] = static_cast<float>(kLanes - 1 - i);
  const Device<float> x(ramp(kLanes));
  return run(kKernel, 1, kLanes, 0, x.at()) && x.equals(reversed);
}

}  // namespace

const std::vector<Seed> kWarps{
    {"reduction_without_a_step", sums<reduction_without_a_step<true>>,
     sums<reduction_without_a_step<false>>},
    {"shuffle_in_a_branch", sums<shuffle_in_a_branch<true>>, sums<shuffle_in_a_branch<false>>},
    {"shuffle_outside_of_the_mask", sums<shuffle_outside_of_the_mask<true>>,
     sums<shuffle_outside_of_the_mask<false>>},
    {"shuffle_with_a_lane_that_returned", sums<shuffle_with_a_lane_that_returned<true>>,
     sums<shuffle_with_a_lane_that_returned<false>>},
    {"missing_warp_barrier", reverses<missing_warp_barrier<true>>,
     reverses<missing_warp_barrier<false>>},
    {"shuffle_as_a_barrier", reverses<shuffle_as_a_barrier<true>>,
     reverses<shuffle_as_a_barrier<false>>},
};

}  // namespace seeded
