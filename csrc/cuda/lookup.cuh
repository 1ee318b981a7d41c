// Rows of up to three tables that ids name, added, and what dropout leaves of their sum.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"

namespace tilewise {

template <typename T>
struct Table {
  const int64_t* ids;  // null: the turns themselves
  const T* rows;       // null: no table
  int64_t count, stride, period;
};

template <typename T>
struct Tables {
  Table<T> token, position, segment;
};

struct Draw {
  int64_t threshold;  // 0 drops none, 2^32 all
  float scale;        // of what is kept
  const int64_t *seeds, *offsets;
  int64_t seed_stride, offset_stride, seed, offset;
};

// The rows that make up one row of the result; where one is missing there is not any.
template <typename T>
struct Place {
  const T *token, *position, *segment;
  bool there;
};

__device__ inline int64_t remainder_of(int64_t a, int64_t b) {
  if ((a | b) >> 32) return a % b;
  return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

template <typename T>
__device__ const T* find(const Table<T>& table, int64_t row, bool& there) {
  if (!table.rows) return nullptr;
  const int64_t turn = remainder_of(row, table.period);
  const int64_t id = table.ids ? table.ids[turn] : turn;
  const bool found = id >= 0 && id < table.count;
  there = there && found;
  return table.rows + (found ? id * table.stride : 0);
}

template <typename T>
__device__ Place<T> find(const Tables<T>& tables, int64_t row) {
  bool there = true;
  const T* token = find(tables.token, row, there);
  const T* position = find(tables.position, row, there);
  const T* segment = find(tables.segment, row, there);
  return {token, position, segment, there};
}

template <int kWidth, typename T>
__device__ void gather(float (&v)[kWidth], const Place<T>& place, int64_t col) {
  load(v, place.token + col);
  for (const T* row : {place.position, place.segment}) {
    if (!row) continue;
    float more[kWidth];
    load(more, row + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] += more[i];
  }
}

template <int kWidth>
__device__ void drop(float (&v)[kWidth], const Draw& draw, int64_t row, int64_t col) {
  if (draw.scale == 1.f && draw.threshold == 0) return;
  const int64_t seed = draw.seeds ? draw.seeds[row * draw.seed_stride] : draw.seed;
  const int64_t offset = draw.offsets ? draw.offsets[row * draw.offset_stride] : draw.offset;
  const auto counter_row = static_cast<uint32_t>(draw.seed_stride ? 0 : row);
  const auto threshold = static_cast<uint64_t>(draw.threshold);
  const auto group = static_cast<uint32_t>(col / kPhiloxGroup);
  const auto words_of = [&](uint32_t g) {
    return philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), counter_row, g);
  };
  if constexpr (kWidth == 1) {
    const PhiloxWords words = words_of(group);
    const auto place = static_cast<int>(col % kPhiloxGroup);
    const uint32_t low = place == 0 ? words.at[0] : words.at[1];
    const uint32_t high = place == 2 ? words.at[2] : words.at[3];
    v[0] = keep(place < 2 ? low : high, threshold) ? v[0] * draw.scale : 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += kPhiloxGroup) {
      const PhiloxWords words = words_of(group + i / kPhiloxGroup);
#pragma unroll
      for (int j = 0; j < kPhiloxGroup; ++j) {
        v[i + j] = keep(words.at[j], threshold) ? v[i + j] * draw.scale : 0.f;
      }
    }
  }
}

template <typename T>
inline Table<T> table_of(const int64_t* ids, const void* rows, int64_t count, int64_t stride,
                         int64_t period) {
  return {ids, static_cast<const T*>(rows), count, stride, period};
}

}  // namespace tilewise
