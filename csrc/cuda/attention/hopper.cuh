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
// 198656 and 149504. nvcc 13.0 has no spills, packed or not, and uses up to 229, 196 and 152
// registers. Warpgroups share what the block begins with: 168 a thread of 384, 128 of 512.
//
// By count, not measured: the tensor cores need 1280, 1024 and 512 cycles for the two products of a
// consumer's tile, its powers 640, 512 and 512. One other consumer covers the softmax for heads of
// 128; for 64 powers and products bound alike, and it takes two.
template <int kDim>
struct HopperShape {
  static constexpr int kConsumers = kDim == 64 ? 3 : 2, kStages = kDim == 64 ? 3 : 2;
  static constexpr int kQueries = kConsumers * kGroupRows;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (1 + kConsumers));
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

constexpr int kLastingBytes = 32 << 20;  // of keys and values that stay in L2 together

// In which order the tiles of some heads are worked on, of queries, or, by the kernel of dk and dv,
// of keys. Heads go by `section`, whose keys and values, or queries and dout, stay in L2; of a
// section the last tiles of all heads come first if they see the most.
struct Schedule {
  int heads, tiles, section;
  bool last_first;

  // row_bytes: of what passes by, of a key and its values.
  __host__ __device__ static Schedule of(int kv_heads, int group, int tiles, int seq_k,
                                         int row_bytes, bool last_first) {
    const int most = kLastingBytes / row_bytes / (seq_k > 0 ? seq_k : 1);
    const int together = most < 1 ? 1 : most < kv_heads ? most : kv_heads;
    return {kv_heads * group, tiles, together * group, last_first};
  }

  struct Place {
    int head, tile;
  };
  __device__ Place at(unsigned number) const {
    const unsigned first = number / (section * tiles) * section;
    const unsigned rest = number - first * tiles;
    const unsigned beside = min(static_cast<unsigned>(section), heads - first);
    const int turn = rest / beside;
    return {static_cast<int>(first + rest % beside), last_first ? tiles - 1 - turn : turn};
  }
};

template <typename T>
struct Launch {
  CUtensorMap q, k, v, out;
  Forward<T> f;
  Packed packed;
  Schedule schedule;  // of all batches; those of packed sequences are made on the way
};

// The queries or the keys of a sequence. first: as of a Block. How maps of packed sequences have
// their rows says in_sequences().
template <bool kPacked>
struct Extent {
  int first, count, all;

  __device__ int row(int i) const { return kPacked ? all - count + i : i; }
  __device__ int line() const { return kPacked ? first + count : first; }
};

__device__ inline int ahead_of(const Sizes& size) { return size.seq_k - size.seq_q; }

// A tile of queries, and the tiles of keys that it sees.
template <bool kPacked>
struct Item {
  Extent<kPacked> q, k;
  int head, query0;
  Reach keys;

  template <typename T>
  __device__ Item(const Attention<T>& a, const Extent<kPacked>& q, const Extent<kPacked>& k,
                  int head, int query0, int queries, int keys)
      : q(q),
        k(k),
        head(head),
        query0(query0),
        keys(query0, min(query0 + queries, q.count) - 1, ahead(), a.options.left, a.options.right,
             k.count, keys) {}

  __device__ int ahead() const { return k.count - q.count; }
  // The n-th tile of keys: those that are not seen whole come first.
  __device__ int at(int n) const { return keys.at(keys.count() - 1 - n); }
  __device__ int partial() const { return keys.count() - keys.whole(); }
};

// The items of a launch, numbered without gaps.
template <bool kPacked, typename T, int kDim, int kKeys>
struct Items {
  static constexpr int kQueries = HopperShape<kDim>::kQueries;
  const Launch<T>& launch;

  __device__ bool reach(unsigned number) const {
    const Schedule& s = launch.schedule;
    return number < static_cast<unsigned>(s.heads) * s.tiles;
  }

  __device__ Item<kPacked> at(unsigned number) const {
    const Sizes& size = launch.f.a.size;
    const auto place = launch.schedule.at(number);
    const int batch = place.head / size.heads, head = place.head % size.heads;
    return {launch.f.a, {batch, size.seq_q, 0}, {batch, size.seq_k, 0}, head, place.tile * kQueries,
            kQueries,   kKeys};
  }
};

// Those of packed sequences are counted one sequence after the other, on a way that goes forward
// only and once: no block reads more ends than there are.
template <typename T, int kDim, int kKeys>
struct Items<true, T, kDim, kKeys> {
  static constexpr int kQueries = HopperShape<kDim>::kQueries;
  const Launch<T>& launch;
  int sequence = -1;
  unsigned end = 0;  // of its items

  __device__ Sequence queries() const {
    const Packed& p = launch.packed;
    return {p.ends_q, p.rows_q, sequence, launch.f.a.size.seq_q};
  }
  __device__ static int tiles(const Sequence& q) { return (q.count + kQueries - 1) / kQueries; }

  // Whether there is an item of this number, which is not below the last one that was asked for.
  __device__ bool reach(unsigned number) {
    while (number >= end) {
      if (++sequence == launch.f.a.size.batch) return false;
      end += static_cast<unsigned>(launch.f.a.size.heads) * tiles(queries());
    }
    return true;
  }

  // The one that was reached.
  __device__ Item<true> at(unsigned number) const {
    const Attention<T>& a = launch.f.a;
    const Packed& p = launch.packed;
    const Sequence q = queries(), k(p.ends_k, p.rows_k, sequence, a.size.seq_k);
    const auto schedule = Schedule::of(a.size.kv_heads, a.group(), tiles(q), k.count,
                                       2 * sizeof(T) * kDim, a.options.right >= 0);
    const auto place = schedule.at(number + schedule.heads * schedule.tiles - end);
    const int all_q = static_cast<int>(p.rows_q), all_k = static_cast<int>(p.rows_k);
    return {a,        {q.first, q.count, all_q}, {k.first, k.count, all_k},
            place.head, place.tile * kQueries,     kQueries,
            kKeys};
  }
};

// Call body with each item of this block. The grid goes through them to and fro, so that who had
// the longest of a round has the shortest of the next.
template <bool kPacked, int kDim, int kKeys, typename T, typename Body>
__device__ void for_items(const Launch<T>& launch, Body body) {
  Items<kPacked, T, kDim, kKeys> items{launch};
  unsigned step = 2 * (gridDim.x - blockIdx.x) - 1;  // to the mirrored place in the next round
  for (unsigned number = blockIdx.x; items.reach(number);
       number += step, step = 2 * gridDim.x - step) {
    body(items.at(number));
  }
}

}  // namespace tilewise
