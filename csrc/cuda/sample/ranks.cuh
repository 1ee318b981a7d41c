// Where a rank ends: after so many tokens, or so much of their mass, by logit and then by column,
// without a sort. Tokens are shared out to bins by their distance from the largest; of the bin in
// which the goal is, again, by the bits of their logits, and of those that are equal by column. So
// there are seven passes at most, whatever the row; two or three of a usual one. Bins are sums of
// integers: they do not depend on the order, nor on how many blocks share the row.
#pragma once

#include "cuda/sample/options.cuh"

namespace tilewise {

constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr float kBinsOfUnit = 64.f;  // of the first pass
constexpr uint64_t kNever = ~uint64_t{0};

// Of a multiprocessor, of a kernel that goes on with a row after its cut. Of two ptxas spills some
// values on sm_120, where shared memory has room for no more than one that holds a long slice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kCutBlocks = 1;
#else
constexpr int kCutBlocks = 2;
#endif

// Ordered as the numbers are; NaN is above all of them.
__device__ inline uint32_t ordered(float v) {
  const uint32_t bits = v == v ? __float_as_uint(v) : 0x7fffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// e^gap of the gap to the largest logit, over the temperature; its sum is exact, in units of 2^-40.
struct Masses {
  float top, temperature;

  __device__ float gap(float v) const {
    return v == top ? 0.f : __fdiv_rn(v - top, temperature);  // not inf - inf
  }
  __device__ uint64_t of(float v) const {
    return static_cast<uint64_t>(expf(gap(v)) * 0x1p40f + 0.5f);
  }
};

// What is left of a row: what is above a key, and of that key before the column `stop`.
struct Cut {
  uint32_t key;
  int stop;

  __device__ bool keeps(float v, int column) const {
    const uint32_t mine = ordered(v);
    return mine > key || (mine == key && column < stop);
  }
};

__device__ inline Cut no_cut() { return {0, kNoColumn}; }

// What tokens amount to: their number or their mass; and, if that is their mass, their number.
struct Amount {
  uint64_t weight, count;
};

__device__ inline Amount operator+(Amount a, Amount b) {
  return {a.weight + b.weight, a.count + b.count};
}

struct Bins {
  // Of a weight: a sum of 32 bits is one instruction, a sum of 64 is a loop.
  uint32_t low[kBins], high[kBins];
  uint32_t count[kBins];
  Amount warps[kMaxTeamWarps];
  Amount blocks[kMaxTeamBlocks];
  // The bin that was found, what is before it, and in it.
  int bin;
  Amount before, in;

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      low[bin] = high[bin] = count[bin] = 0;
    }
    __syncthreads();
  }

  __device__ void add(int bin, uint64_t weight, bool counts) {
    const auto lower = static_cast<uint32_t>(weight);
    auto upper = static_cast<uint32_t>(weight >> 32);
    if (lower) upper += atomicAdd(&low[bin], lower) > ~lower;  // carried
    if (upper) atomicAdd(&high[bin], upper);
    if (counts) atomicAdd(&count[bin], 1u);
  }

  __device__ Amount of(int bin) const { return {uint64_t{high[bin]} << 32 | low[bin], count[bin]}; }
};

__device__ inline Amount all_of(const Cluster& cluster, Bins& bins, int bin) {
  Amount all{};
  for (int block = 0; block < cluster.blocks; ++block) {
    all = all + cluster.in_block(&bins, block)->of(bin);
  }
  return all;
}

// The sum over the threads of the block before this one, itself included.
__device__ inline Amount sum_until(Bins& bins, Amount mine) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    Amount other;
    other.weight = __shfl_up_sync(kWarpMask, mine.weight, distance);
    other.count = __shfl_up_sync(kWarpMask, mine.count, distance);
    if (lane >= distance) mine = mine + other;
  }
  if (lane == kWarpSize - 1) bins.warps[warp] = mine;
  __syncthreads();
  for (int i = 0; i < warp; ++i) mine = mine + bins.warps[i];
  return mine;
}

// The same over the blocks before this one; `all` is then the sum over all threads of the row.
__device__ inline Amount sum_until(const Cluster& cluster, Bins& bins, Amount mine, Amount& all) {
  Amount until = sum_until(bins, mine);
  if (threadIdx.x == blockDim.x - 1) {
    for (int block = 0; block < cluster.blocks; ++block) {
      cluster.in_block(&bins, block)->blocks[cluster.rank] = until;
    }
  }
  cluster.sync();
  all = {};
  for (int block = 0; block < cluster.blocks; ++block) {
    if (block < cluster.rank) until = until + bins.blocks[block];
    all = all + bins.blocks[block];
  }
  return until;
}

// Find the bin in which the sum of weights reaches the goal, once every thread has added its own;
// returns the sum of all. The last bin, where they do not: before it is then all there is. Each
// block sums up its part of the bins over all blocks, and whose part has the goal tells the others.
__device__ inline Amount find(const Cluster& cluster, Bins& bins, uint64_t goal) {
  cluster.sync();
  const int part = kBins / cluster.blocks, begin = cluster.rank * part;
  const int each = (part + blockDim.x - 1) / blockDim.x;
  const int first = begin + min(static_cast<int>(threadIdx.x) * each, part);
  const int last = min(first + each, begin + part);
  Amount mine{};
  for (int bin = first; bin < last; ++bin) mine = mine + all_of(cluster, bins, bin);
  Amount all;
  const Amount until = sum_until(cluster, bins, mine, all);
  if (all.weight < goal) {
    if (threadIdx.x == 0) {
      bins.bin = kBins - 1;
      bins.before = all;
      bins.in = {kNever, kNever};
    }
  } else if (until.weight >= goal && until.weight - mine.weight < goal) {
    Amount before{until.weight - mine.weight, until.count - mine.count}, in{};
    int bin = first;
    for (;; ++bin) {
      in = all_of(cluster, bins, bin);
      if (before.weight + in.weight >= goal || bin == last - 1) break;
      before = before + in;
    }
    for (int block = 0; block < cluster.blocks; ++block) {
      Bins* told = cluster.in_block(&bins, block);
      told->bin = bin;
      told->before = before;
      told->in = in;
    }
  }
  cluster.sync();
  return all;
}

// The first pass: even steps down from the largest. Everything far away is in the last bin, which
// is never added up: what is not before it is in it.
__device__ inline int step_of(float top, float v) {
  const float steps = v == top ? 0.f : (top - v) * kBinsOfUnit;
  return steps < kBins - 1 ? static_cast<int>(steps) : kBins - 1;
}

// The least depth below the largest, in keys, that has come to this step.
__device__ inline uint32_t depth_of_step(float top, int step, uint32_t deepest) {
  uint32_t low = 0, high = deepest + 1;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (step_of(top, from_ordered(ordered(top) - middle)) >= step) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Cut the row where, in rank, the number or the mass of its tokens reaches the goal, above 0.
template <typename Row>
__device__ Cut cut_at(const Cluster& cluster, Bins& bins, const Row& row, Masses masses,
                      uint64_t goal, bool by_mass) {
  const auto weight_of = [&](float v) { return by_mass ? masses.of(v) : uint64_t{1}; };
  const float top = masses.top;
  const uint32_t top_key = ordered(top), deepest = top_key - ordered(-INFINITY);
  // What is left to look at: depths, or columns of one key, from low to high. What is before it,
  // and in it.
  uint32_t low = 0, high = deepest, key = 0;
  Amount before{}, in{kNever, kNever};
  const auto is_whole = [&] {  // whether all of it is before the cut
    return by_mass ? in.count == 1 : before.weight + in.weight == goal;
  };
  if (top == top) {
    bins.clear();
    row.each([&](int, const float (&v)[kGroup]) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int step = step_of(top, v[i]);
        if (step < kBins - 1) {
          const uint64_t weight = weight_of(v[i]);
          if (weight) bins.add(step, weight, by_mass);
        }
      }
    });
    find(cluster, bins, goal);
    before = bins.before;
    in = bins.in;
    low = min(depth_of_step(top, bins.bin, deepest), deepest);
    if (bins.bin < kBins - 1) high = depth_of_step(top, bins.bin + 1, deepest) - 1;
  }
  for (bool are_columns = false;;) {
    if (!are_columns && (low == high || is_whole())) {
      key = top_key - high;
      if (is_whole()) return {key, kNoColumn};
      are_columns = true;
      low = 0;
      high = row.vocab - 1;
    }
    if (are_columns && (low == high || is_whole())) return {key, static_cast<int>(high) + 1};
    goal -= before.weight;
    const int bits = 32 - __clz(static_cast<int>(high - low)), shift = max(bits - kBinBits, 0);
    bins.clear();
    row.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t mine = ordered(v[i]), at = are_columns ? col + i : top_key - mine;
        if (at < low || at > high || (are_columns && mine != key)) continue;
        const uint64_t weight = weight_of(v[i]);
        if (weight) bins.add((at - low) >> shift, weight, by_mass);
      }
    });
    find(cluster, bins, goal);
    before = bins.before;
    in = bins.in;
    const uint32_t begin = min(static_cast<uint32_t>(bins.bin), (high - low) >> shift) << shift;
    high = min(high, low + begin + ((1u << shift) - 1));
    low += begin;
  }
}

template <typename Row>
__device__ uint64_t mass_of(const Cluster& cluster, Bins& bins, const Row& row, Masses masses,
                            Cut cut) {
  uint64_t mass = 0;
  row.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (cut.keeps(v[i], col + i)) mass += masses.of(v[i]);
    }
  });
  bins.clear();
  bins.add(threadIdx.x, mass, false);
  return find(cluster, bins, kNever).weight;
}

// What all filters leave of a row whose largest logit is above -inf, and lies in a column.
template <typename Row>
__device__ Cut cut_of(const Cluster& cluster, Bins& bins, const Row& row, const Filters& filters,
                      const Best& largest) {
  if (filters.is_greedy()) return {ordered(largest.value), largest.column + 1};
  const Masses masses{largest.value, filters.temperature};
  Cut cut = no_cut();
  if (0 < filters.top_k && filters.top_k < row.vocab) {
    cut = cut_at(cluster, bins, row, masses, filters.top_k, false);
  }
  if (filters.top_p < 1.f) {
    const uint64_t all = mass_of(cluster, bins, row, masses, cut);
    const float goal = __fmul_rn(filters.top_p, static_cast<float>(all));
    const auto part = static_cast<uint64_t>(ceilf(goal));
    cut = cut_at(cluster, bins, row, masses, min(part, all), true);
  }
  if (filters.min_p > 0.f) {
    const float apart = __fmul_rn(filters.temperature, logf(filters.min_p));
    const uint32_t lowest = ordered(without_sign_of_zero(__fadd_rn(largest.value, apart)));
    if (lowest > cut.key) cut = {lowest, kNoColumn};
  }
  return cut;
}

// What is left of a row after all filters.
struct Left {
  Masses masses;
  Cut cut;
  float whole;  // the mass of all that is

  // Beside an infinite logit nothing else is left.
  __device__ bool keeps(float v, int column) const {
    return cut.keeps(v, column) && (masses.top < INFINITY || v == masses.top);
  }
  __device__ float probability(float v, int column) const {
    return keeps(v, column) ? __fdiv_rn(expf(masses.gap(v)), whole) : 0.f;
  }
};

// As of cut_of.
template <typename Row>
__device__ Left left_of(const Cluster& cluster, Bins& bins, const Row& row, const Filters& filters,
                        const Best& largest, bool weighs) {
  Left left{{largest.value, filters.temperature}, no_cut(), 1.f};
  left.cut = cut_of(cluster, bins, row, filters, largest);
  if (weighs) {
    const uint64_t all = mass_of(cluster, bins, row, left.masses, left.cut);
    left.whole = static_cast<float>(all) * 0x1p-40f;
  }
  return left;
}

}  // namespace tilewise
