// What csrc/cuda/mma.cuh offers, for kernels on a CPU: mma.cpp.
#pragma once

#include "emulation/runtime.h"

namespace tilewise {

namespace emulation {
void copy_async(void* to, const void* from, int bytes, int valid, Place place);
void copy_async_wait(int pending, Place place);
void load_matrices(uint32_t* out, int count, bool transposed, const void* row, Place place);
// 16 x 8 sums of products of 16-bit numbers, or of tf32.
enum class MmaType { bf16, f16, tf32 };
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaType type, Place place);
}  // namespace emulation

template <int kBytes>
void copy_async(void* to, const void* from, int valid = kBytes,
                emulation::Place place = emulation::Place::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(to, from, kBytes, valid, place);
}

void copy_async_commit();

template <int kPending>
void copy_async_wait(emulation::Place place = emulation::Place::here()) {
  emulation::copy_async_wait(kPending, place);
}

template <bool kTransposed = false, int kCount>
void load_matrices(uint32_t (&out)[kCount], const void* row,
                   emulation::Place place = emulation::Place::here()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulation::load_matrices(out, kCount, kTransposed, row, place);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         emulation::Place place = emulation::Place::here()) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>, "bf16 or fp16");
  emulation::mma(d, a, b, kBf16 ? emulation::MmaType::bf16 : emulation::MmaType::f16, place);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     emulation::Place place = emulation::Place::here()) {
  emulation::mma(d, a, b, emulation::MmaType::tf32, place);
}

inline uint32_t to_tf32(float value) {
  uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;  // inf and NaN stay
  return (bits + 0x1000) & 0xffffe000;
}

}  // namespace tilewise
