// What csrc/cuda/hopper.cuh offers, for kernels on a CPU: the same functions, and what they wait
// for is done as late as it may be. Each ends in a place, for the report.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulation/runtime.h"

namespace tilewise {

inline uint32_t shared_address(const void* pointer,
                               emulation::Place place = emulation::Place::here()) {
  return emulation::shared_offset(pointer, place);
}

// --- Barriers: hopper_barrier.cpp

void barrier_init(uint64_t* barrier, uint32_t arrivals,
                  emulation::Place place = emulation::Place::here());
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, emulation::Place place = emulation::Place::here());
void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes,
                           emulation::Place place = emulation::Place::here());
void barrier_arrive_remote(uint64_t* barrier, uint32_t rank,
                           emulation::Place place = emulation::Place::here());
bool barrier_try_wait(uint64_t* barrier, uint32_t parity,
                      emulation::Place place = emulation::Place::here());
void barrier_wait(uint64_t* barrier, uint32_t parity,
                  emulation::Place place = emulation::Place::here());
void barrier_wait_cluster(uint64_t* barrier, uint32_t parity,
                          emulation::Place place = emulation::Place::here());

inline void named_barrier_sync(int id, int threads,
                               emulation::Place place = emulation::Place::here()) {
  emulation::sync_named(id, threads, "barrier.sync", place);
}

inline void named_barrier_arrive(int id, int threads,
                                 emulation::Place place = emulation::Place::here()) {
  emulation::arrive_named(id, threads, "barrier.arrive", place);
}

// --- Bulk tensor copies: hopper_copy.cpp

namespace emulation {
void load_box(void* to, const CUtensorMap& map, uint64_t* barrier, const int* at, int rank,
              Place place);
void store_box(const CUtensorMap& map, const void* from, const int* at, int rank, Place place);
void bulk_wait(int pending, bool read, Place place);
void check_map(const CUtensorMap& map, int rank, Place place);
}  // namespace emulation

void fence_async();
void bulk_commit();

template <int kRank>
void tensor_load(void* to, const CUtensorMap& map, uint64_t* barrier, const int (&at)[kRank],
                 uint64_t = 0, emulation::Place place = emulation::Place::here()) {
  emulation::load_box(to, map, barrier, at, kRank, place);
}

template <int kRank>
void tensor_store(const CUtensorMap& map, const void* from, const int (&at)[kRank],
                  emulation::Place place = emulation::Place::here()) {
  emulation::store_box(map, from, at, kRank, place);
}

template <int kPending>
void bulk_wait(emulation::Place place = emulation::Place::here()) {
  emulation::bulk_wait(kPending, false, place);
}

template <int kPending>
void bulk_wait_read(emulation::Place place = emulation::Place::here()) {
  emulation::bulk_wait(kPending, true, place);
}

inline void tensor_map_prefetch(const CUtensorMap& map,
                                emulation::Place place = emulation::Place::here()) {
  emulation::check_map(map, 0, place);
}

inline uint64_t evict_first() { return 1; }
inline uint64_t evict_last() { return 2; }

// --- Registers and clusters: hopper_block.cpp

namespace emulation {
void change_registers(int registers, bool claim, Place place);
void* peer(void* pointer, uint32_t rank, Place place);
}  // namespace emulation

template <int kRegisters>
void registers_claim(emulation::Place place = emulation::Place::here()) {
  static_assert(24 <= kRegisters && kRegisters <= 256 && kRegisters % 8 == 0);
  emulation::change_registers(kRegisters, true, place);
}

template <int kRegisters>
void registers_release(emulation::Place place = emulation::Place::here()) {
  static_assert(24 <= kRegisters && kRegisters <= 256 && kRegisters % 8 == 0);
  emulation::change_registers(kRegisters, false, place);
}

inline uint32_t cluster_rank() { return emulation::cluster_rank(); }
inline uint32_t cluster_size() { return emulation::cluster_blocks(); }
void cluster_arrive(emulation::Place place = emulation::Place::here());
void cluster_wait(emulation::Place place = emulation::Place::here());

inline void cluster_sync(emulation::Place place = emulation::Place::here()) {
  cluster_arrive(place);
  cluster_wait(place);
}

template <typename T>
T* peer(T* pointer, uint32_t rank, emulation::Place place = emulation::Place::here()) {
  using Bare = std::remove_const_t<T>;
  return static_cast<T*>(emulation::peer(const_cast<Bare*>(pointer), rank, place));
}

// --- Grids run one after the other, and each sees all that those before it wrote.

inline void dependents_launch() {}
inline void dependencies_wait() {}

}  // namespace tilewise
