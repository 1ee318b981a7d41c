// The tensor cores of a warpgroup: one tile, its operands laid out in every way that they read.
#include "cuda/cluster_launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_map.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64, kDepth = 64, kMaxCols = 256;
constexpr int kStep = 16;  // of K, in one instruction

struct Shared {
  alignas(kTileAlignment) uint8_t a[kRows * kDepth * 2];
  alignas(kTileAlignment) uint8_t b[kDepth * kMaxCols * 2];
  uint64_t loaded;
};

// A tile of `outer` rows of `inner` 16-bit elements, in boxes of row_bytes by all its rows.
struct Boxes {
  int inner, outer;
  Swizzle swizzle;

  __device__ int width() const { return row_bytes(swizzle) / 2; }
  __device__ int bytes() const { return outer * row_bytes(swizzle); }

  __device__ void load(uint8_t* to, const CUtensorMap& map, uint64_t* loaded) const {
    for (int i = 0; i < inner / width(); ++i) {
      tensor_load(to + i * bytes(), map, loaded, {i * width(), 0});
    }
  }

  // Of what is needed of the tile from row or column k of K on.
  template <Fault kFault>
  __device__ uint64_t descriptor(const uint8_t* tile, Major major, int k) const {
    const bool none = swizzle == Swizzle::none;
    int offset = k * row_bytes(swizzle);
    int leading = bytes(), stride = 8 * row_bytes(swizzle);
    if (major == Major::k) {
      offset = k / width() * bytes() + k % width() * 2;
    } else if (none) {
      leading = 8 * row_bytes(swizzle);
      stride = bytes();
    }
    if constexpr (kFault == Fault::wgmma_wrong_offset) offset /= 2;
    if constexpr (kFault == Fault::wgmma_wrong_leading) leading /= 2;
    if constexpr (kFault == Fault::wgmma_wrong_stride) stride /= 2;
    const Swizzle told = kFault == Fault::wgmma_wrong_swizzle ? Swizzle::bytes64 : swizzle;
    return advance(tile_descriptor(tile, leading, stride, told), offset);
  }
};

template <Fault kFault, typename T, int kCols, bool kRegistersA, Major kA, Major kB>
__global__ void __launch_bounds__(kThreads)
    wgmma_kernel(float* c, const T* a, const __grid_constant__ CUtensorMap a_map,
                 const __grid_constant__ CUtensorMap b_map, Swizzle swizzle) {
  auto& shared = shared_tiles<Shared>();
  const auto a_boxes =
      kA == Major::k ? Boxes{kDepth, kRows, swizzle} : Boxes{kRows, kDepth, swizzle};
  const auto b_boxes =
      kB == Major::k ? Boxes{kDepth, kCols, swizzle} : Boxes{kCols, kDepth, swizzle};
  if (threadIdx.x == 0) {
    barrier_init(&shared.loaded, 1);
    barrier_init_fence();
    barrier_arrive_expect(&shared.loaded, (kRows + kCols) * kDepth * 2);
    a_boxes.load(shared.a, a_map, &shared.loaded);
    b_boxes.load(shared.b, b_map, &shared.loaded);
  }
  __syncthreads();
  barrier_wait(&shared.loaded, 0);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int row = 16 * warp + lane / 4, col = 2 * (lane % 4);
  uint32_t fragments[kDepth / kStep][4] = {};
  if constexpr (kRegistersA) {
#pragma unroll
    for (int i = 0; i < kDepth / kStep * 4; ++i) {
      const int r = row + i % 2 * 8, k = i / 4 * kStep + i / 2 % 2 * 8 + col;
      fragments[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(a + r * kDepth + k);
    }
  }

  float d[kCols / 2];
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) d[i] = 1.f;  // what is not accumulated must not be seen
  if constexpr (kFault != Fault::wgmma_not_fenced) wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDepth / kStep; ++i) {
    const uint64_t b_tile = b_boxes.descriptor<kFault>(shared.b, kB, i * kStep);
    if constexpr (kRegistersA) {
      wgmma<T, kB>(d, fragments[i], b_tile, i > 0);
    } else {
      const uint64_t a_tile = a_boxes.descriptor<kFault>(shared.a, kA, i * kStep);
      wgmma<T, kA, kB>(d, a_tile, b_tile, i > 0);
    }
  }
  wgmma_commit();
  if constexpr (kFault == Fault::wgmma_sums_changed) d[0] *= 2.f;
  if constexpr (kFault != Fault::wgmma_not_awaited) wgmma_wait<0>(d);

#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) {
    c[(row + i / 2 % 2 * 8) * kCols + i / 4 * 8 + col + i % 2] = d[i];
  }
  if constexpr (kFault == Fault::wgmma_not_awaited) wgmma_wait<0>(d);
}

// Of a [outer, inner] matrix without gaps.
cudaError_t make_map(CUtensorMap* map, DType dtype, const void* x, int64_t inner, int64_t outer,
                     Swizzle swizzle) {
  return make_tensor_map(map, dtype, x, {inner, outer}, {inner},
                         {row_bytes(swizzle) / 2, static_cast<int>(outer)}, swizzle);
}

template <Fault kFault, typename T, int kCols, bool kRegistersA, Major kA, Major kB>
cudaError_t multiply(float* c, const void* a, const void* b, Swizzle swizzle, DType dtype,
                     cudaStream_t stream) {
  CUtensorMap a_map, b_map;
  cudaError_t status = make_map(&a_map, dtype, a, 64, 64, swizzle);
  if (status != cudaSuccess) return status;
  status = kB == Major::k ? make_map(&b_map, dtype, b, kDepth, kCols, swizzle)
                          : make_map(&b_map, dtype, b, kCols, kDepth, swizzle);
  if (status != cudaSuccess) return status;
  return launch_clusters(wgmma_kernel<kFault, T, kCols, kRegistersA, kA, kB>, 1, 1, kThreads,
                         kSharedBytes<Shared>, stream, c, static_cast<const T*>(a), a_map, b_map,
                         swizzle);
}

// Any number of columns with both operands in shared memory and along K.
template <int... kCols>
cudaError_t for_cols(std::integer_sequence<int, kCols...>, float* c, const void* a, const void* b,
                     int64_t cols, Swizzle swizzle, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  ((cols == kCols
        ? void(status = multiply<Fault::none, __nv_bfloat16, kCols, false, Major::k, Major::k>(
                   c, a, b, swizzle, DType::bf16, stream))
        : void()),
   ...);
  return status;
}

}  // namespace

cudaError_t wgmma_tile(float* c, const void* a, const void* b, int64_t cols, bool a_registers,
                       bool a_transposed, bool b_transposed, int swizzle_code, DType dtype,
                       Fault fault, cudaStream_t stream) {
  const auto swizzle = static_cast<Swizzle>(swizzle_code);
  if (cols != 128) {
    using Cols = std::integer_sequence<int, 16, 32, 48, 64, 80, 96, 112, 144, 160, 176, 192, 208,
                                       224, 240, 256>;
    return for_cols(Cols{}, c, a, b, cols, swizzle, stream);
  }
  const auto with = [&](auto t, auto planted) {
    using T = typename decltype(t)::type;
    constexpr Fault kFault = decltype(planted)::value;
    constexpr Major kK = Major::k, kMn = Major::mn;
    auto* multiplied = multiply<kFault, T, 128, false, kK, kMn>;
    if constexpr (kFault == Fault::none) {
      if (a_registers) {
        multiplied = b_transposed ? multiply<kFault, T, 128, true, kK, kK>
                                  : multiply<kFault, T, 128, true, kK, kMn>;
      } else if (a_transposed) {
        multiplied = b_transposed ? multiply<kFault, T, 128, false, kMn, kK>
                                  : multiply<kFault, T, 128, false, kMn, kMn>;
      } else if (b_transposed) {
        multiplied = multiply<kFault, T, 128, false, kK, kK>;
      }
    }
    return multiplied(c, a, b, swizzle, dtype, stream);
  };
  if (dtype == DType::f16) return with(Type<__half>{}, Planted<Fault::none>{});
  return for_fault<Fault::wgmma_not_awaited, Fault::wgmma_not_fenced, Fault::wgmma_sums_changed,
                   Fault::wgmma_wrong_offset, Fault::wgmma_wrong_leading, Fault::wgmma_wrong_stride,
                   Fault::wgmma_wrong_swizzle>(
      fault, [&](auto planted) { return with(Type<__nv_bfloat16>{}, planted); });
}

}  // namespace tilewise::units
