// The tensor cores of a warp, fed by cp.async through two buffers and by ldmatrix.
#include "cuda/cluster_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kThreads = 128;              // 2 x 2 warps
constexpr int kTile = 64, kWarpTile = 32;  // rows and columns, of a block and of a warp
constexpr int kDepth = 32;                 // of K, in a buffer
constexpr int kPad = 8;                    // elements: neighbouring rows begin in other banks

template <typename T>
struct Shared {
  alignas(16) T a[2][kTile][kDepth + kPad];
  // Of b, or of its transpose: [kTile][kDepth + kPad] or [kDepth][kTile + kPad].
  alignas(16) T b[2][kTile * (kDepth + kPad)];
};

// Copy [kOuter, kInner] from row, col of [rows, cols]; what lies outside is zero.
template <int kBytes, int kOuter, int kInner, typename T>
__device__ void copy_tile(T* to, const T* from, int64_t rows, int64_t cols, int64_t row,
                          int64_t col) {
  constexpr int kWidth = kBytes / sizeof(T);
  for (int i = threadIdx.x * kWidth; i < kOuter * kInner; i += kThreads * kWidth) {
    const int64_t r = row + i / kInner, c = col + i % kInner;
    const bool inside = r < rows && c < cols;
    copy_async<kBytes>(to + i / kInner * (kInner + kPad) + i % kInner,
                       inside ? from + r * cols + c : from, inside ? kBytes : 0);
  }
}

template <Fault kFault, typename T, bool kTransposedB>
__device__ void multiply(float (&d)[2][4][4], const Shared<T>& shared, int buffer, int warp_row,
                         int warp_col) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices(a[i], &shared.a[buffer][warp_row + 16 * i + lane % 16][k + lane / 16 * 8]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = warp_col + 8 * j;
      constexpr bool kWrong = kFault == Fault::mma_wrong_transpose;
      if constexpr (kTransposedB) {
        const int at = (col + lane % 8) * (kDepth + kPad) + k + lane / 8 % 2 * 8;
        load_matrices<kWrong>(b[j], &shared.b[buffer][at]);
      } else {
        load_matrices<!kWrong>(b[j], &shared.b[buffer][(k + lane % 16) * (kTile + kPad) + col]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) mma<T>(d[i / 4][i % 4], a[i / 4], b[i % 4]);
  }
}

template <Fault kFault, typename T, bool kTransposedB, int kBytes>
__global__ void __launch_bounds__(kThreads)
    mma_kernel(float* c, const T* a, const T* b, int64_t rows, int64_t cols, int64_t depth) {
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  const int64_t tiles = (cols + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / tiles * kTile, col0 = blockIdx.x % tiles * kTile;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = warp / 2 * kWarpTile, warp_col = warp % 2 * kWarpTile;

  const auto fetch = [&](int64_t step) {
    const int buffer = step % 2;
    copy_tile<kBytes, kTile, kDepth>(&shared.a[buffer][0][0], a, rows, depth, row0, step * kDepth);
    if constexpr (kTransposedB) {
      copy_tile<kBytes, kTile, kDepth>(shared.b[buffer], b, cols, depth, col0, step * kDepth);
    } else {
      copy_tile<kBytes, kDepth, kTile>(shared.b[buffer], b, depth, cols, step * kDepth, col0);
    }
    copy_async_commit();
  };

  float d[2][4][4] = {};
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  fetch(0);
  for (int64_t step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    if (!last) fetch(step + 1);
    if constexpr (kFault != Fault::mma_copy_not_awaited) {
      if (last && kFault != Fault::mma_copy_awaited_late) {
        copy_async_wait<0>();
      } else {
        copy_async_wait<1>();
      }
    }
    __syncthreads();
    multiply<kFault, T, kTransposedB>(d, shared, step % 2, warp_row, warp_col);
    if constexpr (kFault != Fault::mma_buffer_overwritten) __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int64_t row = row0 + warp_row + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
    const int64_t col = col0 + warp_col + i / 4 % 4 * 8 + 2 * (lane % 4) + i % 2;
    if (row < rows && col < cols) c[row * cols + col] = d[i / 16][i / 4 % 4][i % 4];
  }
}

__global__ void mma_tf32_kernel(float* c, const float* a, const float* b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a_fragment[4], b_fragment[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a_fragment[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
#pragma unroll
  for (int i = 0; i < 2; ++i) b_fragment[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  float d[4] = {};
  mma_tf32(d, a_fragment, b_fragment);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

}  // namespace

cudaError_t mma_tiles(float* c, const void* a, const void* b, int64_t rows, int64_t cols,
                      int64_t depth, bool b_transposed, int copy_bytes, DType dtype, Fault fault,
                      cudaStream_t stream) {
  const auto with = [&](auto t, auto transposed, auto bytes, auto planted) {
    using T = typename decltype(t)::type;
    const int64_t blocks = ((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile);
    return launch(mma_kernel<decltype(planted)::value, T, decltype(transposed)::value,
                             decltype(bytes)::value>,
                  blocks, kThreads, sizeof(Shared<T>), stream, c, static_cast<const T*>(a),
                  static_cast<const T*>(b), rows, cols, depth);
  };
  constexpr Planted<Fault::none> kClean;
  constexpr Type<__nv_bfloat16> kType;
  constexpr std::integral_constant<int, 16> kWidest;
  if (dtype == DType::f16) {
    if (b_transposed) return with(Type<__half>{}, std::true_type{}, kWidest, kClean);
    return with(Type<__half>{}, std::false_type{}, kWidest, kClean);
  }
  if (copy_bytes == 4)
    return with(kType, std::true_type{}, std::integral_constant<int, 4>{}, kClean);
  if (copy_bytes == 8)
    return with(kType, std::true_type{}, std::integral_constant<int, 8>{}, kClean);
  if (!b_transposed) return with(kType, std::false_type{}, kWidest, kClean);
  return for_fault<Fault::mma_copy_not_awaited, Fault::mma_copy_awaited_late,
                   Fault::mma_wrong_transpose, Fault::mma_buffer_overwritten>(
      fault, [&](auto planted) { return with(kType, std::true_type{}, kWidest, planted); });
}

cudaError_t mma_tf32_tile(float* c, const float* a, const float* b, cudaStream_t stream) {
  return launch(mma_tf32_kernel, 1, kWarpSize, 0, stream, c, a, b);
}

}  // namespace tilewise::units
