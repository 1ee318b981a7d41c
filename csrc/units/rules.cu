// What the instructions forbid, one rule for each fault: the emulation must say which was broken.
#include "cuda/cluster_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_map.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kThreads = 128;
constexpr int kBoxCols = 64;  // of the map
[[maybe_unused]] constexpr int kTooFar =
    128;  // bytes a thread: from the tile on, beyond what the kernel has

struct Shared {
  alignas(kTileAlignment) uint8_t tile[kBoxRows * kBoxCols * 2];
  uint64_t barrier;
  uint32_t words[4];
};

template <Fault kFault>
__device__ void break_barriers(Shared& shared) {
  if constexpr (kFault == Fault::rules_barrier_misaligned) {
    barrier_init(reinterpret_cast<uint64_t*>(shared.words + 1), 1);
  } else if constexpr (kFault == Fault::rules_barrier_not_shared) {
    uint64_t own = 0;
    barrier_init(&own, 1);
  } else if constexpr (kFault == Fault::rules_barrier_of_nobody) {
    barrier_init(&shared.barrier, 0);
  } else if constexpr (kFault == Fault::rules_barrier_used_twice) {
    barrier_arrive(&shared.barrier);
    barrier_init(&shared.barrier, 1);
  } else if constexpr (kFault == Fault::rules_barrier_parity) {
    barrier_wait(&shared.barrier, 2);
  } else if constexpr (kFault == Fault::rules_barrier_of_peer) {
    barrier_wait(peer(&shared.barrier, cluster_rank() ^ 1), 0);
  } else if constexpr (kFault == Fault::rules_peer_outside) {
    peer(&shared.barrier, cluster_size());
  } else if constexpr (kFault == Fault::rules_cluster_arrived_twice) {
    cluster_arrive();
    cluster_arrive();
  } else if constexpr (kFault == Fault::rules_cluster_not_arrived) {
    cluster_wait();
  } else if constexpr (kFault == Fault::rules_registers_fewer) {
    registers_claim<24>();
  } else if constexpr (kFault == Fault::rules_registers_differ) {
    threadIdx.x < 64 ? registers_release<24>() : registers_release<32>();
  }
}

template <Fault kFault>
__device__ void break_copies(Shared& shared, const CUtensorMap& map) {
  const uint64_t* const words = reinterpret_cast<const uint64_t*>(&map);
  if constexpr (kFault == Fault::rules_map_by_hand) {
    CUtensorMap made{};
    tensor_map_prefetch(made);
  } else if constexpr (kFault == Fault::rules_map_rank) {
    tensor_load(shared.tile, map, &shared.barrier, {0, 0, 0});
  } else if constexpr (kFault == Fault::rules_box_misaligned) {
    tensor_load(shared.tile + 64, map, &shared.barrier, {0, 0});
  } else if constexpr (kFault == Fault::rules_box_too_far) {
    tensor_load(shared.tile + kTooFar * static_cast<int>(blockDim.x), map, &shared.barrier, {0, 0});
  } else if constexpr (kFault == Fault::rules_store_not_committed) {
    tensor_store(map, shared.tile, {0, 0});
    bulk_wait<0>();
  } else if constexpr (kFault == Fault::rules_copy_misaligned) {
    copy_async<16>(shared.tile + 8, words);
  } else if constexpr (kFault == Fault::rules_copy_too_long) {
    copy_async<16>(shared.tile, words, 20);
  } else if constexpr (kFault == Fault::rules_copy_not_shared) {
    uint4 own;
    copy_async<16>(&own, words);
  } else if constexpr (kFault == Fault::rules_matrix_misaligned) {
    uint32_t matrix[1];
    load_matrices(matrix, shared.words + 1);
  }
}

template <Fault kFault>
__device__ void break_wgmma(Shared& shared) {
  float d[8] = {};
  const auto tile = [&](int offset) {
    return tile_descriptor(shared.tile + offset, 0, kTileAlignment, Swizzle::bytes128);
  };
  wgmma_fence();
  if constexpr (kFault == Fault::rules_wgmma_differ) {
    wgmma<__nv_bfloat16>(d, tile(0), tile(threadIdx.x < 64 ? 0 : kTileAlignment), false);
  } else if constexpr (kFault == Fault::rules_wgmma_misplaced) {
    wgmma<__nv_bfloat16>(d, tile(0), tile(128), false);
  } else if constexpr (kFault == Fault::rules_wgmma_too_far) {
    wgmma<__nv_bfloat16>(d, tile(0), tile(kTooFar * static_cast<int>(blockDim.x)), false);
  } else if constexpr (kFault == Fault::rules_wgmma_bits) {
    wgmma<__nv_bfloat16>(d, tile(0), tile(0) | uint64_t{1} << 52, false);
  } else {
    wgmma<__nv_bfloat16>(d, tile(0), tile(0), false);
  }
  if constexpr (kFault == Fault::rules_wgmma_reshaped) {
    wgmma<__nv_bfloat16>(reinterpret_cast<float (&)[16]>(d), tile(0), tile(0), false);
  }
  wgmma_commit();
  if constexpr (kFault == Fault::rules_wgmma_named_early) wgmma_wait<1>(d);
  if constexpr (kFault == Fault::rules_wgmma_half_waits) {
    if (threadIdx.x < 64) wgmma_wait<0>(d);
  } else if constexpr (kFault != Fault::rules_wgmma_never_waited) {
    wgmma_wait<0>(d);
  }
}

template <Fault kFault>
__global__ void __launch_bounds__(2 * kThreads)
    rules_kernel(float* y, const __grid_constant__ CUtensorMap map) {
  auto& shared = shared_tiles<Shared>();
  for (int i = threadIdx.x; i < kBoxRows * kBoxCols * 2; i += blockDim.x) shared.tile[i] = 0;
  if (threadIdx.x == 0) {
    barrier_init(&shared.barrier, 2);
    barrier_init_fence();
  }
  fence_async();
  cluster_sync();
  constexpr int kFirst = static_cast<int>(Fault::rules_barrier_misaligned);
  constexpr int kCopies = static_cast<int>(Fault::rules_map_by_hand);
  constexpr int kWgmma = static_cast<int>(Fault::rules_wgmma_differ);
  constexpr int kThis = static_cast<int>(kFault);
  if constexpr (kThis >= kFirst && kThis < kCopies) break_barriers<kFault>(shared);
  if constexpr (kThis >= kCopies && kThis < kWgmma) break_copies<kFault>(shared, map);
  if constexpr (kThis >= kWgmma) break_wgmma<kFault>(shared);
  if (threadIdx.x < kThreads) y[blockIdx.x * kThreads + threadIdx.x] = 1.f;
  cluster_sync();
}

}  // namespace

cudaError_t keep_rules(float* y, void* tile, int64_t blocks, Fault fault, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t status = make_tensor_map(&map, DType::bf16, tile, {kBoxCols, kBoxRows},
                                             {kBoxCols}, {kBoxCols, kBoxRows}, Swizzle::bytes128);
  if (status != cudaSuccess) return status;
  // Half a warpgroup more, or a cluster of two blocks that are whole ones.
  const int threads = fault == Fault::rules_wgmma_half_group ? kThreads + 64 : kThreads;
  return for_fault<
      Fault::rules_barrier_misaligned, Fault::rules_barrier_not_shared,
      Fault::rules_barrier_of_nobody, Fault::rules_barrier_used_twice, Fault::rules_barrier_parity,
      Fault::rules_barrier_of_peer, Fault::rules_peer_outside, Fault::rules_cluster_arrived_twice,
      Fault::rules_cluster_not_arrived, Fault::rules_registers_fewer, Fault::rules_registers_differ,
      Fault::rules_map_by_hand, Fault::rules_map_rank, Fault::rules_box_misaligned,
      Fault::rules_box_too_far, Fault::rules_store_not_committed, Fault::rules_copy_misaligned,
      Fault::rules_copy_too_long, Fault::rules_copy_not_shared, Fault::rules_matrix_misaligned,
      Fault::rules_wgmma_differ, Fault::rules_wgmma_misplaced, Fault::rules_wgmma_too_far,
      Fault::rules_wgmma_bits, Fault::rules_wgmma_reshaped, Fault::rules_wgmma_named_early,
      Fault::rules_wgmma_half_waits, Fault::rules_wgmma_never_waited,
      Fault::rules_wgmma_half_group>(fault, [&](auto planted) {
    return launch_clusters(rules_kernel<decltype(planted)::value>, blocks, 2, threads,
                           kSharedBytes<Shared>, stream, y, map);
  });
}

}  // namespace tilewise::units
