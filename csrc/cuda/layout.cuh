// How many threads take a row: one table for all ops that go along rows.
//
//   accesses of a row        team                          because
//   up to 32 held            8, 16 or 32 lanes             no barrier; several rows in a block, and
//                                                          the lanes that leave the fewest idle
//   up to 256 threads held   the warps of a block          as few as hold it: rows in other stages
//                                                          keep memory busy while one is reduced
//   more                     a cluster of 2, 4, 8 blocks   the row is still read once from memory
//   more, no clusters        a block of 512 threads
//   more still               the same, in chunks           read again by each pass: from L2, for
//   few
//                                                          rows are under way at a time
//
// An access is 16 bytes, so with 8 held a row of bfloat16 is a warp's up to 2048 columns, a block's
// up to 16384 and a cluster's up to 262144; of float32, half of it.
#pragma once

#include <algorithm>

#include "cuda/team.cuh"

namespace tilewise {

constexpr int kNarrowThreads = 128;  // of a block with several rows
constexpr int kBlockThreads = 256;   // of a block that is not alone enough for its row
constexpr int kTeamThreads = kMaxTeamWarps * kWarpSize;

// Kernels whose threads hold no more than this many accesses are for short rows: there, what is on
// its way to memory is as many threads as a multiprocessor can have, and ptxas is told so.
constexpr int kFewHeld = 2;
constexpr int kFewBlocks = 10;

struct Layout {
  int threads;  // of a row, in each of its blocks
  int rows;     // of a block
  int blocks;   // of a row
  int held;     // accesses that a thread must hold for the row to be read once
};

constexpr int64_t ceil_divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lanes that leave the fewest without work; of several the most that have two accesses each,
// which are on their way together.
constexpr int lanes_for(int64_t accesses, int held) {
  int best = kWarpSize;
  for (int lanes = kWarpSize; lanes >= 8; lanes /= 2) {
    const int64_t each = ceil_divided(accesses, lanes), before = ceil_divided(accesses, best);
    const bool fewer_idle = each * lanes < before * best;
    const bool more_held = each * lanes == before * best && before < 2;
    if (each <= held && (fewer_idle || more_held)) best = lanes;
  }
  return best;
}

// `held`: how many accesses the kernel's threads hold.
constexpr Layout layout_for(int64_t accesses, int held, bool has_clusters) {
  Layout layout{kWarpSize, 1, 1, 0};
  if (accesses <= int64_t{kWarpSize} * held) {
    layout.threads = lanes_for(accesses, held);
    layout.rows = kNarrowThreads / layout.threads;
  } else {
    const auto threads = [&] {
      return ceil_divided(ceil_divided(accesses, int64_t{held} * layout.blocks), kWarpSize) *
             kWarpSize;
    };
    while (has_clusters && threads() > kBlockThreads && layout.blocks < kMaxTeamBlocks) {
      layout.blocks *= 2;
    }
    layout.threads = static_cast<int>(std::min<int64_t>(threads(), kTeamThreads));
  }
  layout.held = static_cast<int>(std::min<int64_t>(
      ceil_divided(accesses, int64_t{layout.threads} * layout.blocks), INT32_MAX));
  return layout;
}

static_assert(layout_for(8, 8, true).threads == 8);       // 64 columns of bfloat16
static_assert(layout_for(16, 8, true).threads == 8);      // 128
static_assert(layout_for(80, 8, true).threads == 16);     // 640: none is idle
static_assert(layout_for(128, 8, true).threads == 32);    // 1024
static_assert(layout_for(256, 8, true).rows == 4);        // 2048
static_assert(layout_for(1024, 8, true).threads == 128);  // 8192
static_assert(layout_for(2048, 8, true).blocks == 1);     // 16384
static_assert(layout_for(2049, 8, true).blocks == 2);
static_assert(layout_for(16384, 8, true).threads == kBlockThreads);  // 131072
static_assert(layout_for(32768, 8, true).held == 8);                 // 262144
static_assert(layout_for(32768, 8, false).held == 8 * 8);            // read again

}  // namespace tilewise
