// Hopper's own units, each behind a thin function: barriers that count arrivals and bytes, the bulk
// tensor copy engine, clusters, registers handed from warp to warp. One function is one instruction
// (its name in the comment); wgmma.cuh has the tensor cores. On a CPU emulation/hopper.h takes the
// place of the instructions, and nothing else changes.
//
// Elsewhere than on sm_90a the instructions do not exist: a kernel that gets to one traps, and the
// compiler leaves out what comes after. Clusters are in every GPU since Hopper.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

#ifdef TILEWISE_EMULATION
#include "emulation/hopper.h"
#else

#include <cuda.h>

namespace tilewise {

__device__ __forceinline__ void require_hopper() {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  __trap();
  __builtin_unreachable();
#endif
}

__device__ __forceinline__ void require_clusters() {
#if __CUDA_ARCH__ < 900
  __trap();
  __builtin_unreachable();
#endif
}

// The address that instructions want of a pointer into this block's shared memory.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers (mbarrier). A phase is over when all arrivals and all bytes it waits for have come;
// then the next begins. A wait names the parity of the phase it waits for: 0 for the first.

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {  // mbarrier.init
  require_hopper();
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Let the copy engine and the cluster see barriers that were just initialised.
__device__ inline void barrier_init_fence() {  // fence.mbarrier_init
  require_hopper();
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {  // mbarrier.arrive
  require_hopper();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrive, and let the phase wait for this many bytes too.
__device__ inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  require_hopper();
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrive at the same barrier of another block of the cluster.
__device__ inline void barrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  require_hopper();
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Whether the phase of this parity is over; false also if it was not within a system-set time.
__device__ inline bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  require_hopper();
  uint32_t over;
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

// The same for arrivals from other blocks of the cluster, whose writes are then seen.
__device__ inline void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  require_hopper();
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Let the copy engine and the tensor cores see what this thread stored in shared memory.
__device__ inline void fence_async() {  // fence.proxy.async
  require_hopper();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Synchronise this many threads, whole warps, by one of 16 barriers; 0 is that of __syncthreads.
__device__ inline void named_barrier_sync(int id, int threads) {  // barrier.sync
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {  // barrier.arrive
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Bulk tensor copies, by one thread. `at` is where the box begins, innermost dimension first;
// what lies outside the tensor is read as zero and not written.

// Call `copy` with the rank, the names of its coordinates' operands, and these operands.
#define TILEWISE_FOR_RANK(copy)                                                                  \
  static_assert(2 <= kRank && kRank <= 5, "a box has 2 to 5 dimensions");                        \
  if constexpr (kRank == 2) {                                                                    \
    copy("2", "%4, %5", "r"(at[0]), "r"(at[1]));                                                 \
  } else if constexpr (kRank == 3) {                                                             \
    copy("3", "%4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]));                                 \
  } else if constexpr (kRank == 4) {                                                             \
    copy("4", "%4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));                 \
  } else {                                                                                       \
    copy("5", "%4, %5, %6, %7, %8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])); \
  }

// Load a box into shared memory at `to`, 128-byte aligned; its bytes come to `barrier`.
template <int kRank>
__device__ void tensor_load(void* to, const CUtensorMap& map, uint64_t* barrier,
                            const int (&at)[kRank]) {  // cp.async.bulk.tensor
#define TILEWISE_LOAD(rank, coordinates, ...)                                                   \
  asm volatile("cp.async.bulk.tensor." rank                                                     \
               "d.shared::cluster.global.mbarrier::complete_tx::bytes [%1], [%0, {" coordinates \
               "}], [%2];" ::"l"(&map),                                                         \
               "r"(shared_address(to)), "r"(shared_address(barrier)), "n"(0), __VA_ARGS__       \
               : "memory")
  require_hopper();
  TILEWISE_FOR_RANK(TILEWISE_LOAD)
#undef TILEWISE_LOAD
}

// The same, with a policy for L2.
template <int kRank>
__device__ void tensor_load(void* to, const CUtensorMap& map, uint64_t* barrier,
                            const int (&at)[kRank], uint64_t policy) {
#define TILEWISE_LOAD(rank, coordinates, ...)                                                     \
  asm volatile("cp.async.bulk.tensor." rank                                                       \
               "d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%1], [%0, " \
               "{" coordinates "}], [%2], %3;" ::"l"(&map),                                       \
               "r"(shared_address(to)), "r"(shared_address(barrier)), "l"(policy), __VA_ARGS__    \
               : "memory")
  require_hopper();
  TILEWISE_FOR_RANK(TILEWISE_LOAD)
#undef TILEWISE_LOAD
}

// Store a box; it belongs to the bulk group that this thread commits next.
template <int kRank>
__device__ void tensor_store(const CUtensorMap& map, const void* from,
                             const int (&at)[kRank]) {  // cp.async.bulk.tensor
#define TILEWISE_STORE(rank, coordinates, ...)                                                   \
  asm volatile("cp.async.bulk.tensor." rank "d.global.shared::cta.bulk_group [%0, {" coordinates \
               "}], [%1];" ::"l"(&map),                                                          \
               "r"(shared_address(from)), "n"(0), "n"(0), __VA_ARGS__                            \
               : "memory")
  require_hopper();
  TILEWISE_FOR_RANK(TILEWISE_STORE)
#undef TILEWISE_STORE
}
#undef TILEWISE_FOR_RANK

__device__ inline void bulk_commit() {  // cp.async.bulk.commit_group
  require_hopper();
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Wait until at most kPending of this thread's bulk groups are not yet written.
template <int kPending>
__device__ void bulk_wait() {  // cp.async.bulk.wait_group
  require_hopper();
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same, but only until their sources are read: shared memory may then be used again.
template <int kPending>
__device__ void bulk_wait_read() {  // cp.async.bulk.wait_group.read
  require_hopper();
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ inline void tensor_map_prefetch(const CUtensorMap& map) {  // prefetch.tensormap
  require_hopper();
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Policies for L2: what is read once, and what is soon read again.
__device__ inline uint64_t evict_first() {  // createpolicy
  require_hopper();
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline uint64_t evict_last() {
  require_hopper();
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// --- Registers of a warpgroup: the kernel must be compiled for a fixed number of threads.

template <int kRegisters>
__device__ void registers_claim() {  // setmaxnreg.inc
  static_assert(24 <= kRegisters && kRegisters <= 256 && kRegisters % 8 == 0);
  require_hopper();
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ void registers_release() {  // setmaxnreg.dec
  static_assert(24 <= kRegisters && kRegisters <= 256 && kRegisters % 8 == 0);
  require_hopper();
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Clusters.

__device__ inline uint32_t cluster_rank() {  // %cluster_ctarank
  require_clusters();
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_size() {  // %cluster_nctarank
  require_clusters();
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Writes before an arrive are seen after the wait, in every block of the cluster.
__device__ inline void cluster_arrive() {  // barrier.cluster.arrive
  require_clusters();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {  // barrier.cluster.wait
  require_clusters();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of another block of the cluster: loads and stores reach it.
template <typename T>
__device__ T* peer(T* pointer, uint32_t rank) {  // mapa
  require_clusters();
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// --- Kernels that begin before the one before them in the stream has ended.

__device__ inline void dependents_launch() {  // griddepcontrol.launch_dependents
  require_hopper();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until what the grid before this one wrote is seen.
__device__ inline void dependencies_wait() {  // griddepcontrol.wait
  require_hopper();
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace tilewise

#endif

namespace tilewise {

constexpr int kTileAlignment = 1024;  // of what the copy engine swizzles: its longest period

// The block's dynamic shared memory as a T that is aligned for any swizzle.
template <typename T>
__device__ T& shared_tiles() {
  auto* raw = reinterpret_cast<unsigned char*>(dynamic_shared());  // compilers see where it points
  return *reinterpret_cast<T*>(raw + -reinterpret_cast<uintptr_t>(raw) % kTileAlignment);
}

// How many bytes of shared memory a launch asks for, to have them aligned.
template <typename T>
constexpr int64_t kSharedBytes = sizeof(T) + kTileAlignment;

}  // namespace tilewise
