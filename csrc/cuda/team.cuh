// The threads that share a row: 8, 16 or 32 lanes of a warp, the warps of a block, or the blocks of
// a cluster. blockDim.x of them are in one block, and blockDim.y teams; only those within a warp
// have others beside them.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/rows.cuh"
#include "cuda/statistics.cuh"

namespace tilewise {

constexpr int kMaxTeamWarps = 16;  // in each block
constexpr int kMaxTeamBlocks = 8;  // what every GPU with clusters can have
constexpr unsigned kWarpMask = 0xffffffff;

// Merge what the lanes of a team found; each of them gets the same bits.
template <typename Statistic>
__device__ Statistic merge_lanes(Statistic mine) {
  constexpr int kValues = sizeof(Statistic) / sizeof(float);
  const int lanes = min(static_cast<int>(blockDim.x), kWarpSize);
  for (int distance = 1; distance < lanes; distance *= 2) {
    Statistic other;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      reinterpret_cast<float*>(&other)[i] =
          __shfl_xor_sync(kWarpMask, reinterpret_cast<const float*>(&mine)[i], distance);
    }
    const bool comes_after = threadIdx.x & distance;
    mine = comes_after ? merge(other, mine) : merge(mine, other);
  }
  return mine;
}

template <typename Statistic>
class Team {
 public:
  // `blocks`: of the cluster, which the launch asked for; 1 without.
  __device__ explicit Team(int blocks)
      : blocks_(blocks), rank_(blocks > 1 ? static_cast<int>(cluster_rank()) : 0) {
    TILEWISE_SHARED(inbox, Statistic[2 * kMaxTeamBlocks * kMaxTeamWarps]);
    inbox_ = inbox;
    if (blocks_ > 1) cluster_arrive();  // waited for before the first exchange
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  __device__ int size() const { return blocks_ * blockDim.x; }
  __device__ int index() const { return rank_ * blockDim.x + threadIdx.x; }
  // Which block, or cluster, of the grid this is.
  __device__ int64_t number() const { return blockIdx.x / blocks_; }

  // Merge what the threads of the team found; each of them gets the same bits. All come here,
  // those of teams without a row too. One exchange, whatever the team: every warp puts what it
  // found into the inboxes of all blocks, and after a barrier reads its own block's. The next
  // exchange has other inboxes, so nobody has to wait until these are read.
  __device__ Statistic reduce(Statistic mine) {
    mine = merge_lanes(mine);
    if (blockDim.x <= kWarpSize) return mine;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    Statistic* box = inbox_ + turn_ % 2 * (kMaxTeamBlocks * kMaxTeamWarps);
    Statistic* place = box + rank_ * warps + warp;
    if (blocks_ == 1) {
      if (lane == 0) *place = mine;
      __syncthreads();
    } else {
      if (turn_ == 0) cluster_wait();  // until all blocks have begun
      if (lane < blocks_) *peer(place, lane) = mine;
      cluster_sync();
    }
    ++turn_;
    const int all_warps = blocks_ * warps;
    Statistic all = lane < all_warps ? box[lane] : Statistic::nothing();
    for (int i = lane + kWarpSize; i < all_warps; i += kWarpSize) all = merge(all, box[i]);
    return merge_lanes(all);
  }

  // The last thing that a thread does with its team.
  __device__ void leave() {
    if (blocks_ > 1 && turn_ == 0) cluster_wait();
  }

 private:
  int blocks_, rank_, turn_ = 0;
  Statistic* inbox_;
};

}  // namespace tilewise
