// c = a b^T, the way that fast Hopper kernels work: a producer warp keeps a ring of tiles filled by
// the copy engine, two consumer warpgroups empty it into the tensor cores. A slot's `full` barrier
// counts the bytes that come, its `empty` barrier the consumers that are done with it. The sums go
// back through shared memory, by the copy engine too.
#include "cuda/cluster_launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_map.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kRows = 128, kCols = 128, kDepth = 64;  // of a tile; kDepth fills a swizzled row
constexpr int kGroupRows = kRows / kConsumers;
constexpr int kBoxCols = 64;  // of c, which fill a swizzled row
constexpr int kSlots = 4;
constexpr int kStepBytes = 32;               // 16 of K
constexpr int kGroupBytes = 8 * kDepth * 2;  // 8 rows

template <typename T>
struct Shared {
  alignas(kTileAlignment) T a[kSlots][kRows * kDepth];
  alignas(kTileAlignment) T b[kSlots][kCols * kDepth];
  alignas(kTileAlignment) T c[kConsumers][kCols / kBoxCols][kGroupRows * kBoxCols];
  uint64_t full[kSlots], empty[kSlots];
};

template <Fault kFault, typename T>
__device__ void produce(Shared<T>& shared, const CUtensorMap& a, const CUtensorMap& b, int row,
                        int col, int steps) {
  for (int step = 0; step < steps; ++step) {
    const int slot = step % kSlots;
    const uint32_t round = step / kSlots % 2;
    barrier_wait(&shared.empty[slot], kFault == Fault::gemm_empty_parity ? round : round ^ 1);
    constexpr int kBytes = (kRows + kCols) * kDepth * sizeof(T);
    barrier_arrive_expect(&shared.full[slot],
                          kFault == Fault::gemm_wrong_bytes ? kBytes / 2 : kBytes);
    tensor_load(shared.a[slot], a, &shared.full[slot], {step * kDepth, row}, evict_first());
    tensor_load(shared.b[slot], b, &shared.full[slot], {step * kDepth, col});
  }
}

template <Fault kFault, typename T>
__device__ void consume(float (&d)[kCols / 2], Shared<T>& shared, int consumer, int steps) {
  const auto tile = [](const T* at) {
    return tile_descriptor(at, 0, kGroupBytes, Swizzle::bytes128);
  };
  constexpr int kOwnRows = kFault == Fault::gemm_wrong_half ? kGroupRows / 2 : kGroupRows;
  for (int step = 0; step < steps; ++step) {
    const int slot = step % kSlots;
    const uint32_t round = step / kSlots % 2;
    if constexpr (kFault != Fault::gemm_full_not_awaited) {
      barrier_wait(&shared.full[slot], kFault == Fault::gemm_full_parity ? round ^ 1 : round);
    }
    const uint64_t a = tile(shared.a[slot] + consumer * kOwnRows * kDepth);
    const uint64_t b = tile(shared.b[slot]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma<T>(d, advance(a, k * kStepBytes), advance(b, k * kStepBytes), true);
    }
    wgmma_commit();
    if constexpr (kFault == Fault::gemm_slot_released_early) {
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>(d);
    }
    const bool one = threadIdx.x % kWarpgroup == 0;
    const bool many = kFault == Fault::gemm_too_many_arrivals && threadIdx.x % kWarpSize == 0;
    if (one || many) barrier_arrive(&shared.empty[slot]);
  }
  if constexpr (kFault == Fault::gemm_slot_released_early) wgmma_wait<0>(d);
}

// Each warp writes its own rows, in pairs of columns, and one thread sends all of them off.
template <Fault kFault, typename T>
__device__ void put(T (&tile)[kCols / kBoxCols][kGroupRows * kBoxCols], const CUtensorMap& c,
                    const float (&d)[kCols / 2], int consumer, int row, int col) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarpSize;
#pragma unroll
  for (int i = 0; i < kCols / 4; ++i) {
    const int r = thread / kWarpSize * 16 + lane / 4 + i % 2 * 8;
    const int column = i / 2 * 8 + lane % 4 * 2;
    const uint32_t offset = (r * kBoxCols + column % kBoxCols) * sizeof(T);
    auto* bytes = reinterpret_cast<uint8_t*>(tile[column / kBoxCols]);
    const float pair[] = {d[2 * i], d[2 * i + 1]};
    store(reinterpret_cast<T*>(bytes + swizzled(offset, Swizzle::bytes128)), pair);
  }
  if constexpr (kFault != Fault::gemm_store_not_fenced) fence_async();
  if constexpr (kFault != Fault::gemm_store_too_early) named_barrier_sync(1 + consumer, kWarpgroup);
  if (thread == 0) {
    for (int i = 0; i < kCols / kBoxCols; ++i) tensor_store(c, tile[i], {col + i * kBoxCols, row});
    bulk_commit();
    bulk_wait_read<0>();
  }
}

template <Fault kFault, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap c, const __grid_constant__ CUtensorMap a,
                const __grid_constant__ CUtensorMap b, int tiles, int steps) {
  auto& shared = shared_tiles<Shared<T>>();
  const int row0 = blockIdx.x / tiles * kRows, col0 = blockIdx.x % tiles * kCols;
  if (threadIdx.x == 0 && kFault != Fault::gemm_barrier_not_initialised) {
    tensor_map_prefetch(a);
    tensor_map_prefetch(b);
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  dependencies_wait();

  const int group = threadIdx.x / kWarpgroup;
  if (group == 0) {
    if constexpr (kFault != Fault::gemm_registers_not_released) registers_release<40>();
    if (threadIdx.x == 0) produce<kFault>(shared, a, b, row0, col0, steps);
  } else {
    registers_claim<232>();
    float d[kCols / 2] = {};
    consume<kFault>(d, shared, group - 1, steps);
    dependents_launch();
    put<kFault>(shared.c[group - 1], c, d, group - 1, row0 + (group - 1) * kGroupRows, col0);
  }
}

template <Fault kFault, typename T>
cudaError_t multiply(void* c, const void* a, const void* b, int64_t rows, int64_t cols,
                     int64_t depth, DType dtype, cudaStream_t stream) {
  CUtensorMap maps[3];
  const auto make = [&](int i, const void* x, int64_t inner, int64_t outer, int width, int height) {
    return make_tensor_map(&maps[i], dtype, x, {inner, outer}, {inner}, {width, height},
                           Swizzle::bytes128);
  };
  cudaError_t status = make(0, c, cols, rows, kBoxCols, kGroupRows);
  if (status == cudaSuccess) status = make(1, a, depth, rows, kDepth, kRows);
  if (status == cudaSuccess) status = make(2, b, depth, cols, kDepth, kCols);
  if (status != cudaSuccess) return status;
  const auto tiles = [](int64_t size, int tile) {
    return static_cast<int>((size + tile - 1) / tile);
  };
  return launch_clusters(gemm_kernel<kFault, T>, int64_t{tiles(rows, kRows)} * tiles(cols, kCols),
                         1, kThreads, kSharedBytes<Shared<T>>, stream, maps[0], maps[1], maps[2],
                         tiles(cols, kCols), tiles(depth, kDepth));
}

}  // namespace

cudaError_t gemm(void* c, const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth,
                 DType dtype, Fault fault, cudaStream_t stream) {
  if (dtype == DType::f16) {
    return multiply<Fault::none, __half>(c, a, b, rows, cols, depth, dtype, stream);
  }
  return for_fault<Fault::gemm_full_not_awaited, Fault::gemm_slot_released_early,
                   Fault::gemm_empty_parity, Fault::gemm_full_parity, Fault::gemm_too_many_arrivals,
                   Fault::gemm_wrong_bytes, Fault::gemm_barrier_not_initialised,
                   Fault::gemm_wrong_half, Fault::gemm_store_not_fenced,
                   Fault::gemm_store_too_early, Fault::gemm_registers_not_released>(
      fault, [&](auto planted) {
        return multiply<decltype(planted)::value, __nv_bfloat16>(c, a, b, rows, cols, depth, dtype,
                                                                 stream);
      });
}

}  // namespace tilewise::units
