// What the kernels of attention on Hopper work with: tiles that the copy engine brings and wgmma
// reads, the rings they come in, and which block works on what.
#pragma once

#include "cuda/attention/forward.cuh"
#include "cuda/tensor_map.cuh"

namespace tilewise {

constexpr int kWarpgroup = 128, kGroupRows = 64;
constexpr int kPanelCols = 64;                   // that fill a swizzled row
constexpr int kRowBytes = 128, kStepBytes = 32;  // of a panel; 16 of its columns
constexpr int kStepRows = 16;                    // of values, in one wgmma

// Consumers, and slots of a ring. Of a consumer's registers the sums, a tile's scores and the
// rounded probabilities of the one before take 64 + 80 + 40 for heads of 128 and tiles of 160 keys,
// 64 + 64 + 32 for tiles of 128, and for heads of 64 32 + 64 + 32. Shared bytes of a block: 231424,
// 198656 and 149504. nvcc 13.0 has no spills.
//
// By count, not measured: the tensor cores need 1280, 1024 and 512 cycles for the two products of a
// consumer's tile, its powers 640, 512 and 512. One other consumer covers the softmax for heads of
// 128; for 64 powers and products bound alike, and it takes two.
template <int kDim>
struct HopperShape {
  static constexpr int kConsumers = kDim == 64 ? 3 : 2, kStages = kDim == 64 ? 3 : 2;
  static constexpr int kQueries = kConsumers * kGroupRows;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
};

// Rows in panels of 64 columns, each swizzled.
template <typename T, int kRows, int kDim>
struct Panels {
  static constexpr int kPanels = kDim / kPanelCols, kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  alignas(kTileAlignment) T at[kPanels][kRows * kPanelCols];

  // Let the copy engine bring the rows of a head from `row` on.
  __device__ void load(const CUtensorMap& map, uint64_t* full, int row, int head, int batch,
                       uint64_t policy) {
    barrier_arrive_expect(full, kBytes);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      tensor_load(at[i], map, full, {i * kPanelCols, row, head, batch}, policy);
    }
  }

  // As an operand whose rows, from `row` on, are the rows or columns of a product.
  __device__ uint64_t across(int row) const {
    return tile_descriptor(at[0] + row * kPanelCols, 0, 8 * kRowBytes, Swizzle::bytes128);
  }
  // How far its step k, of 16 columns, is.
  __device__ static int step(int k) {
    constexpr int kSteps = kRowBytes / kStepBytes;
    return k / kSteps * kPanelBytes + k % kSteps * kStepBytes;
  }
  // As an operand whose columns are those of a product, and 16 rows a step.
  __device__ uint64_t down() const {
    return tile_descriptor(at[0], kPanelBytes, 8 * kRowBytes, Swizzle::bytes128);
  }
};

// Where the next tile is in a ring, and whether the ring has gone round an odd number of times.
template <int kStages>
struct Turn {
  int slot = 0;
  uint32_t odd = 0;

  __device__ void next() {
    if (++slot == kStages) slot = 0, odd ^= 1;
  }
};

template <typename T, int kDim, int kKeys>
struct HopperShared {
  using S = HopperShape<kDim>;
  Panels<T, S::kQueries, kDim> q, out;
  Panels<T, kKeys, kDim> k[S::kStages], v[S::kStages];
  // Of each slot: its bytes have come; all consumers are done with it.
  uint64_t q_full, q_empty, k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages],
      v_empty[S::kStages];

  __device__ void init() {
    barrier_init(&q_full, 1), barrier_init(&q_empty, S::kConsumers);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(&k_full[i], 1), barrier_init(&k_empty[i], S::kConsumers);
      barrier_init(&v_full[i], 1), barrier_init(&v_empty[i], S::kConsumers);
    }
    barrier_init_fence();
  }
};

// In which order the tiles of queries are worked on. Heads go by `section`, whose keys and values
// stay in L2; of a section the last tiles of all heads come first if they see the most.
struct Schedule {
  int heads, tiles, section;  // heads: of all batches
  bool last_first;
};

template <typename T>
struct Launch {
  CUtensorMap q, k, v, out;
  Forward<T> f;
  Schedule schedule;
};

__device__ inline int ahead_of(const Sizes& size) { return size.seq_k - size.seq_q; }

// A tile of queries, and the tiles of keys that it sees.
struct Item {
  int index, batch, head, kv_head, query0;  // index: batch * heads + head
  Reach keys;

  template <typename T>
  __device__ Item(const Forward<T>& f, int index, int query0, int queries, int keys)
      : index(index),
        batch(index / f.a.size.heads),
        head(index % f.a.size.heads),
        kv_head(head / f.a.group()),
        query0(query0),
        keys(query0, min(query0 + queries, f.a.size.seq_q) - 1, ahead_of(f.a.size), f.a.options.left,
             f.a.options.right, f.a.size.seq_k, keys) {}

  // The n-th tile of keys: those that are not seen whole come first.
  __device__ int at(int n) const { return keys.at(keys.count() - 1 - n); }
  __device__ int partial() const { return keys.count() - keys.whole(); }
};

// Call body with each item of this block. The grid goes through them to and fro, so that who had
// the longest of a round has the shortest of the next.
template <int kDim, int kKeys, typename T, typename Body>
__device__ void for_items(const Launch<T>& launch, Body body) {
  const Schedule& s = launch.schedule;
  const unsigned all = static_cast<unsigned>(s.heads) * s.tiles;
  for (unsigned before = 0, round = 0; before < all; before += gridDim.x, ++round) {
    const unsigned number = before + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (number >= all) continue;
    const unsigned first = number / (s.section * s.tiles) * s.section;
    const unsigned rest = number - first * s.tiles;
    const unsigned beside = min(static_cast<unsigned>(s.section), s.heads - first);
    const int turn = rest / beside, tile = s.last_first ? s.tiles - 1 - turn : turn;
    constexpr int kQueries = HopperShape<kDim>::kQueries;
    body(Item(launch.f, first + rest % beside, tile * kQueries, kQueries, kKeys));
  }
}

}  // namespace tilewise
