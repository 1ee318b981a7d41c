// Copies that a thread does not wait for, and the tensor cores of a single warp: from sm_80 on.
// One function is one instruction. On a CPU emulation/mma.h takes the place of the instructions.
#pragma once

#include <cuda_runtime.h>

#include "cuda/dtype.cuh"

#ifdef TILEWISE_EMULATION
#include "emulation/mma.h"
#else

namespace tilewise {

// Copy kBytes, 4, 8 or 16, to shared memory; of these the last kBytes - valid are zero, and with
// valid = 0 nothing is read.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, int valid = kBytes) {  // cp.async
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

__device__ inline void copy_async_commit() {  // cp.async.commit_group
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most kPending of this thread's groups are on their way. Other threads see the
// copies after a barrier.
template <int kPending>
__device__ void copy_async_wait() {  // cp.async.wait_group
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load kCount matrices of 8 rows by 16 bytes from shared memory. Lane 8 * i + j has the address of
// row j of matrix i, and gets of each matrix elements 2 * (lane % 4) and the next of row lane / 4;
// transposed, it gets those of column lane / 4, of rows 2 * (lane % 4) and the next.
template <bool kTransposed = false, int kCount>
__device__ void load_matrices(uint32_t (&out)[kCount], const void* row) {  // ldmatrix
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define TILEWISE_LOAD_MATRICES(modifiers, names, source, ...)                                   \
  asm volatile("ldmatrix.sync.aligned.m8n8." modifiers ".shared.b16 {" names "}, [" source "];" \
               : __VA_ARGS__                                                                    \
               : "r"(address)                                                                   \
               : "memory")
#define TILEWISE_LOAD_EITHER(count, ...)                 \
  if constexpr (kTransposed) {                           \
    TILEWISE_LOAD_MATRICES(count ".trans", __VA_ARGS__); \
  } else {                                               \
    TILEWISE_LOAD_MATRICES(count, __VA_ARGS__);          \
  }
  if constexpr (kCount == 1) {
    TILEWISE_LOAD_EITHER("x1", "%0", "%1", "=r"(out[0]))
  } else if constexpr (kCount == 2) {
    TILEWISE_LOAD_EITHER("x2", "%0, %1", "%2", "=r"(out[0]), "=r"(out[1]))
  } else {
    TILEWISE_LOAD_EITHER("x4", "%0, %1, %2, %3", "%4", "=r"(out[0]), "=r"(out[1]), "=r"(out[2]),
                         "=r"(out[3]))
  }
#undef TILEWISE_LOAD_EITHER
#undef TILEWISE_LOAD_MATRICES
}

// d += a b: a 16 x 16, b 16 x 8, of T bf16 or fp16. With g = lane / 4 and t = 2 * (lane % 4), a
// lane has of a, K t and t + 1 of rows g, g + 8, then K t + 8 and t + 9 of rows g, g + 8; of b,
// column g of K t and t + 1, then t + 8 and t + 9; of d, columns t and t + 1 of rows g, g + 8.
template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  // mma.sync
#define TILEWISE_MMA(type)                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, "                              \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    TILEWISE_MMA("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>, "bf16 or fp16");
    TILEWISE_MMA("f16");
  }
#undef TILEWISE_MMA
}

// d += a b: a 16 x 8, b 8 x 8, of tf32, which is fp32 without its last 13 bits. With g = lane / 4
// and t = lane % 4, a lane has of a, K t of rows g, g + 8, then K t + 4; of b, column g of K t,
// then t + 4; and of d what it has of the other's.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32, ties away from zero.
__device__ inline uint32_t to_tf32(float value) {  // cvt.rna.tf32
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

}  // namespace tilewise

#endif
