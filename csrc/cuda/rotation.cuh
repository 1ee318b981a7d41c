// What turning heads shares: who works on which row, where a row stands, and how pairs are moved.
// A row is one head at one position; a power of two of neighbouring lanes works on it, a slot of
// kWidth pairs each.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/vector.cuh"

namespace tilewise {

constexpr int kRotationThreads = 256;  // of a block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRotationBlocks = 2;  // on an SM: left to itself ptxas wants more there, and spills
#else
constexpr int kRotationBlocks = 0;  // as it sees fit
#endif

// Where the heads of q or of k lie, in elements.
struct Strides {
  int64_t batch, head, seq;
  __device__ int64_t at(int64_t b, int64_t h, int64_t s) const {
    return b * batch + h * head + s * seq;
  }
};

struct Positions {
  const int64_t* ids;  // of each row of each batch, or null: they count from 0
  int64_t ids_batch, ids_seq;
  const int32_t* ends;  // where each packed sequence begins, and the last one ends, or null
  int64_t sequences, offset;
  int64_t count;  // of the tables
};

struct Place {
  bool is_row;    // of any sequence
  bool is_known;  // to the tables
  int64_t position;
};

__device__ inline Place place_of(const Positions& positions, int64_t b, int64_t s) {
  int64_t position = s;
  if (positions.ids) position = positions.ids[b * positions.ids_batch + s * positions.ids_seq];
  bool is_row = true;
  if (positions.ends) {
    int64_t low = 0,
            high = positions.sequences + 1;  // of those that begin here or before, the last
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (positions.ends[middle] <= s ? low : high) = middle;
    }
    is_row = low < positions.sequences;
    position = s - positions.ends[low];
  }
  position += positions.offset;
  return {is_row, position >= 0 && position < positions.count, position};
}

// Call body with the first of each slot of kWidth pairs of this lane.
template <int kWidth, typename Body>
__device__ void for_pairs(int64_t half, Body body) {
  for (int64_t pair = threadIdx.x * kWidth; pair < half; pair += blockDim.x * kWidth) body(pair);
}

// The columns of both elements of a pair: kWidth neighbours each, or pairs side by side.
template <int kWidth, bool kInterleaved, typename T>
__device__ void load_pairs(float (&a)[kWidth], float (&b)[kWidth], const T* x, int64_t pair,
                           int64_t half) {
  if constexpr (!kInterleaved) {
    load(a, x + pair);
    load(b, x + half + pair);
  } else if constexpr (kWidth == 1) {  // not even two may be aligned
    load(a, x + 2 * pair);
    load(b, x + 2 * pair + 1);
  } else {
    float both[2 * kWidth];
    load(both, x + 2 * pair);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = both[2 * i], b[i] = both[2 * i + 1];
  }
}

template <int kWidth, bool kInterleaved, typename T>
__device__ void store_pairs(T* y, const float (&a)[kWidth], const float (&b)[kWidth], int64_t pair,
                            int64_t half) {
  if constexpr (!kInterleaved) {
    store(y + pair, a);
    store(y + half + pair, b);
  } else if constexpr (kWidth == 1) {
    store(y + 2 * pair, a);
    store(y + 2 * pair + 1, b);
  } else {
    float both[2 * kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) both[2 * i] = a[i], both[2 * i + 1] = b[i];
    store(y + 2 * pair, both);
  }
}

// The angle of a position that the tables do not have is NaN, and nothing is read.
template <int kWidth, typename C>
__device__ void load_angles(float (&c)[kWidth], float (&s)[kWidth], const C* cos, const C* sin,
                            bool is_known, float sign) {
  if (is_known) {
    load(c, cos);
    load(s, sin);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    c[i] = is_known ? c[i] : NAN;
    s[i] = is_known ? s[i] * sign : NAN;
  }
}

template <int kWidth>
__device__ void turn(float (&a)[kWidth], float (&b)[kWidth], const float (&c)[kWidth],
                     const float (&s)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float u = a[i], v = b[i];
    a[i] = u * c[i] - v * s[i];
    b[i] = v * c[i] + u * s[i];
  }
}

// Lanes for a row of so many pairs and other columns, and as many rows as a block can have.
inline dim3 lanes_for(int64_t half, int64_t rest, int width) {
  const int64_t slots = (std::max(half, rest) + width - 1) / width;
  unsigned lanes = 1;
  while (lanes < kWarpSize && lanes < slots) lanes *= 2;
  return dim3(lanes, kRotationThreads / lanes);
}

}  // namespace tilewise
