// Hopper's tensor cores: a warpgroup, 4 warps that begin at a multiple of 4, multiplies 64 rows of
// A by kCols columns of B. B lies in shared memory, A there or in registers; the sums are in
// registers, kCols / 2 of a thread: of rows r and r + 8 with r = 16 * warp + lane / 4, of columns
// 2 * (lane % 4), + 1, + 8, + 9, ...: d[4 * i + 2 * j + k] is at row r + 8 * j, column
// 8 * i + 2 * (lane % 4) + k.
//
//   wgmma_fence();                      // registers are as the program says
//   wgmma<T>(d, a, b, true); ...        // several, on 16 more of K each
//   wgmma_commit();                     // a group; others may follow
//   wgmma_wait<0>(d);                   // now d may be read and the tiles overwritten
#pragma once

#include <cuda_runtime.h>

#include "cuda/dtype.cuh"
#include "cuda/hopper.cuh"

namespace tilewise {

// Which neighbours of a tile lie next to each other in memory: those along K, or along M or N.
enum class Major { k = 0, mn = 1 };

// How 16-byte pieces are exchanged within 8 rows of this many bytes, as in CUtensorMapSwizzle.
enum class Swizzle { none = 0, bytes32 = 1, bytes64 = 2, bytes128 = 3 };

__host__ __device__ constexpr int row_bytes(Swizzle swizzle) {
  return 16 << static_cast<int>(swizzle);
}

// Where the byte at this offset of a tile, which is kTileAlignment aligned, really lies.
__host__ __device__ inline uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  const uint32_t pieces = row_bytes(swizzle) / 16;
  return offset ^ ((offset >> 7) % pieces) << 4;
}

// What the tensor cores need to know of a tile in shared memory, all distances in bytes.
//
// Swizzled, K major: a row is row_bytes long, of any number of K; 8 rows are `stride` from the next
// 8, and `leading` says nothing. To go on by 16 of K, add 32 bytes to the tile's address.
// Swizzled, MN major: a row is one K and row_bytes of M or N, and 8 such rows are `stride` from the
// next 8 of K; the next row_bytes of M or N are `leading` away.
// Not swizzled: pieces of 8 rows by 16 bytes, each 128 bytes without a gap. The next piece along K
// is `leading` away, and along M or N `stride`.
__device__ inline uint64_t tile_descriptor(const void* tile, int leading, int stride,
                                           Swizzle swizzle) {
  const auto units = [](uint32_t bytes) { return uint64_t{(bytes & 0x3FFFF) >> 4}; };
  const auto code = static_cast<uint64_t>((4 - static_cast<int>(swizzle)) % 4);
  return units(shared_address(tile)) | units(leading) << 16 | units(stride) << 32 | code << 62;
}

// The descriptor of what lies this many bytes on.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace tilewise

#ifdef TILEWISE_EMULATION
#include "emulation/wgmma.h"
#else

namespace tilewise {

__device__ inline void wgmma_fence() {
  require_hopper();
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
  require_hopper();
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most kPending groups are on their way. `sums`, which belong to earlier ones, are
// named so that the compiler does not read them before.
template <int kPending, int... kSums>
__device__ void wgmma_wait(float (&... sums)[kSums]) {
  require_hopper();
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  const auto hold = [](auto& d) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(d) / sizeof(float)); ++i) {
      asm volatile("" : "+f"(d[i])::"memory");
    }
  };
  (hold(sums), ...);
}

// The registers of the sums, as operands of an instruction: their names, and their values.
#define TILEWISE_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TILEWISE_NAMES_2 TILEWISE_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TILEWISE_NAMES_3 TILEWISE_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TILEWISE_NAMES_4 TILEWISE_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TILEWISE_NAMES_5 TILEWISE_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TILEWISE_NAMES_6 TILEWISE_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TILEWISE_NAMES_7 TILEWISE_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TILEWISE_NAMES_8 TILEWISE_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TILEWISE_NAMES_9 TILEWISE_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define TILEWISE_NAMES_10 TILEWISE_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define TILEWISE_NAMES_11 TILEWISE_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TILEWISE_NAMES_12 TILEWISE_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TILEWISE_NAMES_13 TILEWISE_NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define TILEWISE_NAMES_14 TILEWISE_NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define TILEWISE_NAMES_15 TILEWISE_NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define TILEWISE_NAMES_16 TILEWISE_NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define TILEWISE_8_VALUES(i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TILEWISE_VALUES_1 TILEWISE_8_VALUES(0)
#define TILEWISE_VALUES_2 TILEWISE_VALUES_1, TILEWISE_8_VALUES(8)
#define TILEWISE_VALUES_3 TILEWISE_VALUES_2, TILEWISE_8_VALUES(16)
#define TILEWISE_VALUES_4 TILEWISE_VALUES_3, TILEWISE_8_VALUES(24)
#define TILEWISE_VALUES_5 TILEWISE_VALUES_4, TILEWISE_8_VALUES(32)
#define TILEWISE_VALUES_6 TILEWISE_VALUES_5, TILEWISE_8_VALUES(40)
#define TILEWISE_VALUES_7 TILEWISE_VALUES_6, TILEWISE_8_VALUES(48)
#define TILEWISE_VALUES_8 TILEWISE_VALUES_7, TILEWISE_8_VALUES(56)
#define TILEWISE_VALUES_9 TILEWISE_VALUES_8, TILEWISE_8_VALUES(64)
#define TILEWISE_VALUES_10 TILEWISE_VALUES_9, TILEWISE_8_VALUES(72)
#define TILEWISE_VALUES_11 TILEWISE_VALUES_10, TILEWISE_8_VALUES(80)
#define TILEWISE_VALUES_12 TILEWISE_VALUES_11, TILEWISE_8_VALUES(88)
#define TILEWISE_VALUES_13 TILEWISE_VALUES_12, TILEWISE_8_VALUES(96)
#define TILEWISE_VALUES_14 TILEWISE_VALUES_13, TILEWISE_8_VALUES(104)
#define TILEWISE_VALUES_15 TILEWISE_VALUES_14, TILEWISE_8_VALUES(112)
#define TILEWISE_VALUES_16 TILEWISE_VALUES_15, TILEWISE_8_VALUES(120)

// Overloads for 16 * blocks columns: the number of sums says which. T is the type of A and B.
// d = A B, plus what d was if `accumulate`. r0 to r6 are the operands after the sums.
#define TILEWISE_WGMMA(cols, blocks, r0, r1, r2, r3, r4, r5, r6)                                  \
  template <typename T, Major kA = Major::k, Major kB = Major::k>                                 \
  __device__ void wgmma(float (&d)[8 * blocks], uint64_t a, uint64_t b, bool accumulate) {        \
    TILEWISE_FOR_TYPE(cols, TILEWISE_NAMES_##blocks, r0 ", " r1, r2, ", " r3 ", " r4,             \
                      TILEWISE_VALUES_##blocks : "l"(a), "l"(b), "r"(int{accumulate}),            \
                      "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB)))                       \
  }                                                                                               \
  template <typename T, Major kB = Major::k>                                                      \
  __device__ void wgmma(float (&d)[8 * blocks], const uint32_t (&a)[4], uint64_t b,               \
                        bool accumulate) {                                                        \
    TILEWISE_FOR_TYPE(cols, TILEWISE_NAMES_##blocks, "{" r0 ", " r1 ", " r2 ", " r3 "}, " r4, r5, \
                      ", " r6, TILEWISE_VALUES_##blocks : "r"(a[0]), "r"(a[1]), "r"(a[2]),        \
                      "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(static_cast<int>(kB)))         \
  }
#define TILEWISE_FOR_TYPE(cols, names, factors, accumulate, majors, ...)               \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                    \
    TILEWISE_WGMMA_TEXT(cols, "bf16", names, factors, accumulate, majors, __VA_ARGS__) \
  } else {                                                                             \
    static_assert(std::is_same_v<T, __half>, "bf16 or fp16");                          \
    TILEWISE_WGMMA_TEXT(cols, "f16", names, factors, accumulate, majors, __VA_ARGS__)  \
  }
#define TILEWISE_WGMMA_TEXT(cols, type, names, factors, accumulate, majors, ...)                   \
  require_hopper();                                                                                \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " accumulate                                  \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." type "." type " {" names \
               "}, " factors ", add, 1, 1" majors ";\n}\n"                                         \
               : __VA_ARGS__);

TILEWISE_WGMMA(16, 1, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
TILEWISE_WGMMA(32, 2, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
TILEWISE_WGMMA(48, 3, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
TILEWISE_WGMMA(64, 4, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
TILEWISE_WGMMA(80, 5, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
TILEWISE_WGMMA(96, 6, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
TILEWISE_WGMMA(112, 7, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
TILEWISE_WGMMA(128, 8, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
TILEWISE_WGMMA(144, 9, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
TILEWISE_WGMMA(160, 10, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
TILEWISE_WGMMA(176, 11, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
TILEWISE_WGMMA(192, 12, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
TILEWISE_WGMMA(208, 13, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
TILEWISE_WGMMA(224, 14, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
TILEWISE_WGMMA(240, 15, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
TILEWISE_WGMMA(256, 16, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

}  // namespace tilewise

#endif
