// Rows of up to three tables that ids name, added.
#pragma once

#include "cuda/launch.cuh"
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

template <typename T>
inline Table<T> table_of(const int64_t* ids, const void* rows, int64_t count, int64_t stride,
                         int64_t period) {
  return {ids, static_cast<const T*>(rows), count, stride, period};
}

}  // namespace tilewise
