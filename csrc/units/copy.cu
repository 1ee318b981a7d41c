// The copy engine: one box from a tensor into shared memory and on into another tensor.
#include "cuda/attention/hopper_launch.cuh"
#include "cuda/cluster_launch.cuh"
#include "cuda/tensor_map.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kThreads = 64;
constexpr int kTileBytes = kBoxRows * 128;  // at most

struct Shared {
  alignas(kTileAlignment) uint8_t tile[kTileBytes];
  uint64_t loaded;
};

template <int kRank>
struct Corner {
  int at[kRank];
};

template <Fault kFault, int kRank, typename T>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(T* seen, const __grid_constant__ CUtensorMap from,
                const __grid_constant__ CUtensorMap to, Corner<kRank> corner, Swizzle swizzle) {
  auto& shared = shared_tiles<Shared>();
  const uint32_t bytes = kBoxRows * row_bytes(swizzle);
  if (threadIdx.x == 0) {
    barrier_init(&shared.loaded, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t expected = bytes;
    if constexpr (kFault == Fault::copy_too_few_bytes) expected -= 16;
    if constexpr (kFault == Fault::copy_too_many_bytes) expected += 16;
    barrier_arrive_expect(&shared.loaded, expected);
    tensor_load(shared.tile, from, &shared.loaded, corner.at);
  }
  if constexpr (kFault != Fault::copy_not_awaited) barrier_wait(&shared.loaded, 0);

  if constexpr (kFault == Fault::copy_wrong_swizzle) swizzle = Swizzle::none;
  for (uint32_t i = threadIdx.x; i < bytes / sizeof(T); i += kThreads) {
    T* x = reinterpret_cast<T*>(shared.tile + swizzled(i * sizeof(T), swizzle));
    seen[i] = *x;
    *x = from_float<T>(2.f * to_float(*x));
  }

  if constexpr (kFault != Fault::copy_store_not_fenced) fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tensor_store(to, shared.tile, corner.at);
    bulk_commit();
    if constexpr (kFault != Fault::copy_store_not_awaited) bulk_wait_read<0>();
  }
}

// A box of kBoxRows rows in all.
template <int kRank>
cudaError_t make_map(CUtensorMap* map, DType dtype, const void* x, const int64_t* sizes,
                     Swizzle swizzle) {
  constexpr int kRows[4][4] = {{64, 1, 1, 1}, {16, 4, 1, 1}, {8, 4, 2, 1}, {4, 4, 2, 2}};
  int64_t extents[kRank], strides[kRank - 1];
  int box[kRank];
  box[0] = row_bytes(swizzle) / (dtype == DType::f32 ? 4 : 2);
  for (int i = 0; i < kRank; ++i) {
    extents[i] = sizes[i];
    if (i == 0) continue;
    strides[i - 1] = sizes[i - 1] * (i > 1 ? strides[i - 2] : 1);
    box[i] = kRows[kRank - 2][i - 1];
  }
  return make_tensor_map(map, dtype, x, extents, strides, box, swizzle);
}

template <int kRank, typename T, Fault kFault>
cudaError_t copy(void* stored, void* seen, const void* x, const int64_t* sizes, const int* at,
                 Swizzle swizzle, DType dtype, cudaStream_t stream) {
  CUtensorMap from, to;
  int64_t told[kRank];
  std::copy(sizes, sizes + kRank, told);
  if constexpr (kFault == Fault::copy_map_too_large) ++told[kRank - 1];
  cudaError_t status = make_map<kRank>(&from, dtype, x, told, swizzle);
  if (status == cudaSuccess) status = make_map<kRank>(&to, dtype, stored, sizes, swizzle);
  if (status != cudaSuccess) return status;
  Corner<kRank> corner;
  std::copy(at, at + kRank, corner.at);
  return launch_clusters(copy_kernel<kFault, kRank, T>, 1, 1, kThreads, kSharedBytes<Shared>,
                         stream, static_cast<T*>(seen), from, to, corner, swizzle);
}

}  // namespace

cudaError_t copy_box(void* stored, void* seen, const void* x, int rank, const int64_t* sizes,
                     const int* at, int swizzle, DType dtype, Fault fault, cudaStream_t stream) {
  const auto with = [&](auto ranked, auto t, auto planted) {
    return copy<decltype(ranked)::value, typename decltype(t)::type, decltype(planted)::value>(
        stored, seen, x, sizes, at, static_cast<Swizzle>(swizzle), dtype, stream);
  };
  constexpr Planted<Fault::none> kClean;
  if (dtype == DType::f32) return with(std::integral_constant<int, 2>{}, Type<float>{}, kClean);
  if (dtype == DType::f16) return with(std::integral_constant<int, 2>{}, Type<__half>{}, kClean);
  constexpr Type<__nv_bfloat16> kType;
  if (rank == 3) return with(std::integral_constant<int, 3>{}, kType, kClean);
  if (rank == 4) return with(std::integral_constant<int, 4>{}, kType, kClean);
  if (rank == 5) return with(std::integral_constant<int, 5>{}, kType, kClean);
  return for_fault<Fault::copy_not_awaited, Fault::copy_too_few_bytes, Fault::copy_too_many_bytes,
                   Fault::copy_wrong_swizzle, Fault::copy_store_not_awaited,
                   Fault::copy_store_not_fenced, Fault::copy_map_too_large>(
      fault, [&](auto planted) { return with(std::integral_constant<int, 2>{}, kType, planted); });
}

cudaError_t copy_sequence(void* stored, void* seen, const void* x, int rows, int first, int count,
                          int row, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const auto make = [&](CUtensorMap* map, const void* at) {
    const Heads<const T> packed{static_cast<const T*>(at), kPanelCols, 0, kPanelCols};
    return tilewise::make_map(map, in_sequences(packed, rows, kPanelCols), rows + 1, 1, rows,
                              kPanelCols, kBoxRows);
  };
  CUtensorMap from, to;
  cudaError_t status = make(&from, x);
  if (status == cudaSuccess) status = make(&to, stored);
  if (status != cudaSuccess) return status;
  const Corner<4> corner{{0, rows - count + row, 0, first + count}};
  return launch_clusters(copy_kernel<Fault::none, 4, T>, 1, 1, kThreads, kSharedBytes<Shared>,
                         stream, static_cast<T*>(seen), from, to, corner, Swizzle::bytes128);
}

}  // namespace tilewise::units
