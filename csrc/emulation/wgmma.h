// What csrc/cuda/wgmma.cuh offers, for kernels on a CPU: wgmma.cpp.
#pragma once

#include "emulation/runtime.h"

namespace tilewise {

namespace emulation {

// One instruction, as every thread of the warpgroup issues it.
struct Wgmma {
  uint64_t a, b;
  const uint32_t* fragments;  // of A, or null if it is in shared memory
  int cols;
  bool a_mn_major, b_mn_major, bf16, accumulate;
};

void wgmma_issue(float* sums, const Wgmma& instruction, Place place);
void wgmma_wait(int pending, Place place);
// The program goes on to use these: they must not be on their way.
void wgmma_check(const float* sums, Place place);

}  // namespace emulation

void wgmma_fence(emulation::Place place = emulation::Place::here());
void wgmma_commit(emulation::Place place = emulation::Place::here());

template <int kPending>
void wgmma_wait(emulation::Place place = emulation::Place::here()) {
  emulation::wgmma_wait(kPending, place);
}

template <int kPending, int kSums>
void wgmma_wait(float (&sums)[kSums], emulation::Place place = emulation::Place::here()) {
  emulation::wgmma_wait(kPending, place);
  emulation::wgmma_check(sums, place);
}

template <int kPending, int kSums, int kOthers>
void wgmma_wait(float (&sums)[kSums], float (&others)[kOthers],
                emulation::Place place = emulation::Place::here()) {
  emulation::wgmma_wait(kPending, place);
  emulation::wgmma_check(sums, place);
  emulation::wgmma_check(others, place);
}

template <typename T, Major kA = Major::k, Major kB = Major::k, int kSums>
void wgmma(float (&d)[kSums], uint64_t a, uint64_t b, bool accumulate,
           emulation::Place place = emulation::Place::here()) {
  static_assert(kSums % 8 == 0 && 8 <= kSums && kSums <= 128);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  emulation::wgmma_issue(
      d, {a, b, nullptr, 2 * kSums, kA == Major::mn, kB == Major::mn, kBf16, accumulate}, place);
}

template <typename T, Major kB = Major::k, int kSums>
void wgmma(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           emulation::Place place = emulation::Place::here()) {
  static_assert(kSums % 8 == 0 && 8 <= kSums && kSums <= 128);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  emulation::wgmma_issue(d, {0, b, a, 2 * kSums, false, kB == Major::mn, kBf16, accumulate}, place);
}

}  // namespace tilewise
