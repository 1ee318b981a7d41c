// Reads of what nobody has written, or not yet. Numbers alone show it by luck.
#include "cuda/cluster_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/tensor_map.cuh"
#include "seeded.h"

namespace seeded {
namespace {

constexpr int kThreads = 64;

// Half of it is cleared.
template <bool kBug>
__global__ void uninitialised_dynamic_shared_memory(float* x) {
  TILEWISE_DYNAMIC_SHARED(sums, float);
  for (int i = threadIdx.x; i < (kBug ? kThreads : 2 * kThreads); i += kThreads) sums[i] = 0.5f;
  __syncthreads();
  const int i = threadIdx.x;
  x[i] += sums[i] + sums[i + kThreads];  // found: uninitialised_dynamic_shared_memory
}

// Three numbers of four are stored, and all are loaded at once.
template <bool kBug>
__global__ void uninitialised_part_of_a_vector(float* x) {
  TILEWISE_SHARED(held, float4[kThreads]);
  float4& mine = held[threadIdx.x];
  mine.x = mine.y = mine.z = 0.25f;
  if (!kBug) mine.w = 0.25f;
  __syncthreads();
  const float4 v = held[threadIdx.x ^ 1];  // found: uninitialised_part_of_a_vector
  x[threadIdx.x] += v.x + v.y + v.z + v.w;
}

struct Many {
  float at[12];
};

// The same of more than registers hold.
template <bool kBug>
__global__ void uninitialised_part_of_a_struct(float* x) {
  TILEWISE_SHARED(held, Many[2]);
  if (threadIdx.x < 12) held[0].at[threadIdx.x] = 1.f;
  if (threadIdx.x < (kBug ? 11 : 12)) held[1].at[threadIdx.x] = 1.f;
  __syncthreads();
  Many own = held[threadIdx.x % 2];  // found: uninitialised_part_of_a_struct
  x[threadIdx.x] += own.at[threadIdx.x % 11];
}

// Counting begins at whatever was there.
template <bool kBug>
__global__ void uninitialised_counter(float* x) {
  TILEWISE_SHARED(count, unsigned[1]);
  if (threadIdx.x == 0 && !kBug) atomicExch(&count[0], 0u);  // whatever was there, it begins at 0
  __syncthreads();
  atomicAdd(&count[0], 1u);  // found: uninitialised_counter
  __syncthreads();
  x[threadIdx.x] += count[0] == kThreads ? 1.f : 0.f;
}

// A copy that its own thread has not waited for.
template <bool kBug>
__global__ void read_before_the_copy_came(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  tilewise::copy_async<4>(&held[threadIdx.x], &x[threadIdx.x]);
  tilewise::copy_async_commit();
  if (!kBug) tilewise::copy_async_wait<0>();
  x[threadIdx.x] = held[threadIdx.x] + 1.f;  // found: read_before_the_copy_came
}

struct Tile {
  alignas(1024) float at[2][kThreads];
  uint64_t loaded;
};

// The box has one row; the second is read as well.
template <bool kBug>
__global__ void uninitialised_after_a_short_copy(float* x,
                                                 const __grid_constant__ CUtensorMap map) {
  auto& tile = tilewise::shared_tiles<Tile>();
  if (threadIdx.x == 0) tilewise::barrier_init(&tile.loaded, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    tilewise::barrier_arrive_expect(&tile.loaded, sizeof tile.at / (kBug ? 2 : 1));
    tilewise::tensor_load(tile.at, map, &tile.loaded, {0, 0});
  }
  tilewise::barrier_wait(&tile.loaded, 0);
  const int i = threadIdx.x;
  x[i] += 0.5f * (tile.at[0][i] + tile.at[1][i]);  // found: uninitialised_after_a_short_copy
}

// Each block of the cluster reads what the other has: only the first has anything.
template <bool kBug>
__global__ void uninitialised_shared_memory_of_a_peer(float* x) {
  TILEWISE_SHARED(held, float[kThreads]);
  const unsigned rank = tilewise::cluster_rank();
  if (!kBug || rank == 0) held[threadIdx.x] = 1.f;
  tilewise::cluster_sync();
  const float* theirs = tilewise::peer(&held[0], rank ^ 1);
  x[rank * kThreads + threadIdx.x] +=
      theirs[threadIdx.x];  // found: uninitialised_shared_memory_of_a_peer
  tilewise::cluster_sync();
}

// The last block finds the sums of all but one.
template <bool kBug>
__global__ void uninitialised_global_memory(float* x, float* sums) {
  if (!kBug || threadIdx.x != 7) sums[threadIdx.x] = 1.f;
  x[threadIdx.x] += sums[threadIdx.x];  // found: uninitialised_global_memory
}

std::vector<float> one_more(size_t count) {
  std::vector<float> expected = ramp(count);
  for (float& value : expected) value += 1.f;
  return expected;
}

template <void (*kKernel)(float*), int kShared = 0>
bool adds_one() {
  const Device<float> x(ramp(kThreads));
  return run(kKernel, 1, kThreads, kShared, x.at()) && x.equals(one_more(kThreads));
}

template <void (*kKernel)(float*, float*)>
bool adds_sums() {
  const Device<float> x(ramp(kThreads));
  float* sums;
  cudaMalloc(&sums, kThreads * sizeof(float));
  const bool right = run(kKernel, 1, kThreads, 0, x.at(), sums) && x.equals(one_more(kThreads));
  cudaFree(sums);
  return right;
}

template <void (*kKernel)(float*)>
bool adds_peers() {
  const Device<float> x(ramp(2 * kThreads));
  const cudaError_t status = tilewise::launch_clusters(kKernel, 2, 2, kThreads, 0, nullptr, x.at());
  if (status != cudaSuccess) std::printf("failed: %s\n", cudaGetErrorString(status));
  return status == cudaSuccess && x.equals(one_more(2 * kThreads));
}

template <void (*kKernel)(float*, CUtensorMap), bool kBug>
bool adds_rows() {
  const Device<float> x(ramp(kThreads)), rows(std::vector<float>(2 * kThreads, 1.f));
  CUtensorMap map;
  const cudaError_t status =
      tilewise::make_tensor_map(&map, tilewise::DType::f32, rows.at(), {kThreads, 2}, {kThreads},
                                {kThreads, kBug ? 1 : 2}, tilewise::Swizzle::none);
  if (status != cudaSuccess) return false;
  return run(kKernel, 1, kThreads, tilewise::kSharedBytes<Tile>, x.at(), map) &&
         x.equals(one_more(kThreads));
}

}  // namespace

const std::vector<Seed> kWritten{
    {"uninitialised_dynamic_shared_memory",
     adds_one<uninitialised_dynamic_shared_memory<true>, 2 * kThreads * sizeof(float)>,
     adds_one<uninitialised_dynamic_shared_memory<false>, 2 * kThreads * sizeof(float)>},
    {"uninitialised_part_of_a_vector", adds_one<uninitialised_part_of_a_vector<true>>,
     adds_one<uninitialised_part_of_a_vector<false>>},
    {"uninitialised_part_of_a_struct", adds_one<uninitialised_part_of_a_struct<true>>,
     adds_one<uninitialised_part_of_a_struct<false>>},
    {"uninitialised_counter", adds_one<uninitialised_counter<true>>,
     adds_one<uninitialised_counter<false>>},
    {"read_before_the_copy_came", adds_one<read_before_the_copy_came<true>>,
     adds_one<read_before_the_copy_came<false>>},
    {"uninitialised_after_a_short_copy", adds_rows<uninitialised_after_a_short_copy<true>, true>,
     adds_rows<uninitialised_after_a_short_copy<false>, false>},
    {"uninitialised_shared_memory_of_a_peer",
     adds_peers<uninitialised_shared_memory_of_a_peer<true>>,
     adds_peers<uninitialised_shared_memory_of_a_peer<false>>},
    {"uninitialised_global_memory", adds_sums<uninitialised_global_memory<true>>,
     adds_sums<uninitialised_global_memory<false>>},
};

}  // namespace seeded
