// Clusters: blocks that read each other's shared memory, and that arrive at each other's barriers.
#include "cuda/cluster_launch.cuh"
#include "cuda/hopper.cuh"
#include "units/units.h"

namespace tilewise::units {
namespace {

constexpr int kThreads = 128;

struct Shared {
  float own[kThreads];
  float inbox[kThreads];
  uint64_t delivered;
};

template <Fault kFault>
__global__ void __launch_bounds__(kThreads) cluster_kernel(float* y, const float* x) {
  auto& shared = shared_tiles<Shared>();
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  constexpr bool kHasty = kFault == Fault::cluster_barrier_too_early;
  if (threadIdx.x == 0 && !kHasty) {
    barrier_init(&shared.delivered, kThreads);
    barrier_init_fence();
  }
  shared.own[threadIdx.x] = x[at];
  if constexpr (kFault == Fault::cluster_read_too_early) {
    __syncthreads();  // the own block's is not enough
  } else {
    cluster_sync();
  }
  if (threadIdx.x == 0 && kHasty) barrier_init(&shared.delivered, kThreads);

  const uint32_t next = (rank + 1) % size;
  peer(shared.inbox, next)[threadIdx.x] = x[at];
  barrier_arrive_remote(&shared.delivered, next);
  if constexpr (kFault != Fault::cluster_inbox_not_awaited) {
    barrier_wait_cluster(&shared.delivered, 0);
  }
  float sum = 0.f;
  for (uint32_t i = 0; i < size; ++i) sum += (i + 1) * peer(shared.own, i)[threadIdx.x];
  y[at] = sum + 100.f * shared.inbox[threadIdx.x];

  if constexpr (kFault != Fault::cluster_left_too_early) cluster_sync();
}

}  // namespace

cudaError_t cluster_exchange(float* y, const float* x, int64_t blocks, int cluster, Fault fault,
                             cudaStream_t stream) {
  return for_fault<Fault::cluster_read_too_early, Fault::cluster_left_too_early,
                   Fault::cluster_inbox_not_awaited, Fault::cluster_barrier_too_early>(
      fault, [&](auto planted) {
        return launch_clusters(cluster_kernel<decltype(planted)::value>, blocks, cluster, kThreads,
                               kSharedBytes<Shared>, stream, y, x);
      });
}

}  // namespace tilewise::units
