// Draws from linear logits, which never reach memory: a block has a tile of them, some tokens by
// some rows, multiplied by tensor cores, or of fp32 as they are. It keeps of each row the largest
// logit of its tokens, and the best score, counted from that; a second launch finds the winners.
#include "cuda/attention/tiles.cuh"
#include "cuda/cluster_launch.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/sample/gumbel.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

constexpr int kTokens = kTileTokens;  // whatever the batch: so a score is the same number in any
constexpr int kDown = kTokens / (16 * kAttentionWarps);  // times 16 tokens, of a warp
constexpr int kPitch = kTokens + kGroup;  // of logits: so that rows begin in other banks
constexpr int kFewRows = 16, kManyRows = 64;
constexpr int kWinnerThreads = 256;

template <typename T>
constexpr int kDepth = 128 / sizeof(T);  // columns at a time

template <typename T, int kRows>
struct Stage {
  Tile<T, kTokens, kDepth<T>> weight;
  Tile<T, kRows, kDepth<T>> hidden;
};

// As many as leave room for another block.
template <int kRows>
constexpr int kStages = kRows == kFewRows ? 4 : 3;

template <typename T, int kRows>
constexpr int64_t kStageBytes = kStages<kRows> * int64_t{sizeof(Stage<T, kRows>)};

template <typename T>
struct Linear {
  const T *hidden, *weight, *bias;  // no bias: null
  const float* temperatures;
  int rows, vocab, dim;
  int64_t hidden_stride, weight_stride;
  float temperature;
  bool is_wide;  // whether all accesses to hidden and weight are aligned, and to be had in whole
};

// Of each row and tile of tokens. Largest: NaN if there is one.
struct Parts {
  float *largest, *score;
  int32_t *first, *winner;  // the columns of these two
  int64_t tiles;
};

// Sums of tensor cores, and for fp32 the same sums in the same lanes.
template <typename T, int kRows>
__device__ void multiply(Fragments<kDown, kRows / 8>& d, Stage<T, kRows>& stage) {
  const int lane = threadIdx.x % kWarpSize, token = threadIdx.x / kWarpSize * 16 * kDown;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll 2
    for (int k = 0; k < kDepth<T>; k += 4) {
      float weight[2 * kDown][4], hidden[4];
#pragma unroll
      for (int i = 0; i < 2 * kDown; ++i) {
        load(weight[i], stage.weight.row(token + 8 * i + lane / 4) + k);
      }
#pragma unroll
      for (int n = 0; n < kRows / 4; ++n) {
        load(hidden, stage.hidden.row(n / 2 * 8 + 2 * (lane % 4) + n % 2) + k);
#pragma unroll
        for (int i = 0; i < 2 * kDown * 4; ++i) {
          float& sum = d[i / 8][n / 2][i / 4 % 2 * 2 + n % 2];
          sum = fmaf(weight[i / 4][i % 4], hidden[i % 4], sum);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t a[kDown][4];
#pragma unroll
      for (int m = 0; m < kDown; ++m) load_rows(a[m], stage.weight, token + 16 * m, k);
#pragma unroll
      for (int n = 0; n < kRows / 16; ++n) {
        uint32_t b[4];
        load_across(b, stage.hidden, 16 * n, k);
        multiply_pair<T>(d, a, b, n);
      }
    }
  }
}

// All products of a tile, along the whole of dim.
template <typename T, int kRows>
__device__ void multiply_all(Fragments<kDown, kRows / 8>& d, Stage<T, kRows>* stages,
                             const Linear<T>& linear, int token0, int row0) {
  constexpr int kAhead = kStages<kRows> - 1;
  const auto fetch_step = [&](int step) {
    const int col = step * kDepth<T>;
    if (col < linear.dim) {
      Stage<T, kRows>& stage = stages[step % kStages<kRows>];
      fetch<false>(stage.weight, linear.weight + col, linear.weight_stride, token0, linear.vocab,
                   linear.dim - col, linear.is_wide);
      fetch<false>(stage.hidden, linear.hidden + col, linear.hidden_stride, row0, linear.rows,
                   linear.dim - col, linear.is_wide);
    }
    copy_async_commit();  // of nothing, too: so that as many are pending
  };
#pragma unroll 1
  for (int step = 0; step < kAhead; ++step) fetch_step(step);
#pragma unroll 1
  for (int step = 0; step * kDepth<T> < linear.dim; ++step) {
    copy_async_wait<kAhead - 1>();
    __syncthreads();  // also: nobody reads any more what is fetched over
    fetch_step(step + kAhead);
    multiply<T, kRows>(d, stages[step % kStages<kRows>]);
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Four neighbouring logits of a lane, as a row that draw() goes along.
struct Neighbours {
  int column;
  float at[kGroup];

  template <typename Body>
  __device__ void each(Body body) const {
    body(column, at);
  }
};

template <typename T>
__device__ Neighbours finish(const float* sums, int column, const Linear<T>& linear) {
  Neighbours logits;
  logits.column = column;
  load(logits.at, sums);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float& v = logits.at[i];
    const bool is_token = column + i < linear.vocab;
    if (is_token && linear.bias) v += to_float(linear.bias[column + i]);
    v = is_token ? without_sign_of_zero(v) : -INFINITY;
  }
  return logits;
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    tile_kernel(Parts parts, Linear<T> linear, Draws draws, int row_tiles) {
  float* sums = dynamic_shared();
  const int64_t tile = blockIdx.x / row_tiles;
  const int token0 = static_cast<int>(tile) * kTokens, row0 = blockIdx.x % row_tiles * kRows;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Fragments<kDown, kRows / 8> d{};
  multiply_all<T, kRows>(d, reinterpret_cast<Stage<T, kRows>*>(sums), linear, token0, row0);

#pragma unroll
  for (int i = 0; i < kDown * kRows / 2; ++i) {
    const int m = i / (kRows / 2), n = i / 4 % (kRows / 8), e = i % 4;
    const int token = 16 * (kDown * warp + m) + 8 * (e / 2) + lane / 4;
    sums[(8 * n + 2 * (lane % 4) + e % 2) * kPitch + token] = d[m][n][e];
  }
  __syncthreads();
  for (int r = warp; r < min(kRows, linear.rows - row0); r += kAttentionWarps) {
    const int64_t row = row0 + r, part = row * parts.tiles + tile;
    const int own = kGroup * lane;
    const Neighbours logits = finish(sums + r * kPitch + own, token0 + own, linear);
    Best largest = Best::nothing();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) consider(largest, logits.at[i], logits.column + i);
    largest = merge_lanes(largest);
    const Masses masses{largest.value, number_of(linear.temperatures, linear.temperature, row)};
    const Best best = merge_lanes(draw(logits, masses, largest, no_cut(), Noise(draws, row)));
    if (lane == 0) {
      parts.largest[part] = largest.has_nan ? NAN : largest.value;
      parts.first[part] = largest.column;
      parts.score[part] = best.value;
      parts.winner[part] = best.column;
    }
  }
}

__global__ void __launch_bounds__(kWinnerThreads)
    winner_kernel(int64_t* tokens, Parts parts, const float* temperatures, float temperature) {
  Team<Best> team(1);
  const int64_t row = team.number(), begin = row * parts.tiles, end = begin + parts.tiles;
  const float t = number_of(temperatures, temperature, row);
  Best largest = Best::nothing();
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    consider(largest, parts.largest[i], parts.first[i]);
  }
  largest = team.reduce(largest);
  const Masses masses{largest.value, t};
  Best best = Best::nothing();
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    consider(best, parts.score[i] + masses.gap(parts.largest[i]), parts.winner[i]);
  }
  best = team.reduce(best);
  if (threadIdx.x > 0) return;
  const bool can = t >= 0.f && t < INFINITY && !largest.has_nan && largest.value > -INFINITY;
  tokens[row] = !can ? -1 : t > 0.f ? best.column : largest.column;
}

template <typename T, int kRows>
cudaError_t launch_tiles(const Parts& parts, const Linear<T>& linear, const Draws& draws,
                         cudaStream_t stream) {
  const int64_t row_tiles = ceil_divided(linear.rows, int64_t{kRows});
  const int64_t blocks = parts.tiles * row_tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch_clusters(tile_kernel<T, kRows>, blocks, 1, dim3(kAttentionThreads),
                         kStageBytes<T, kRows>, stream, parts, linear, draws,
                         static_cast<int>(row_tiles));
}

}  // namespace

cudaError_t sample_linear(int64_t* tokens, float* floats, int32_t* columns, const void* hidden,
                          const void* weight, const void* bias, int64_t rows, int64_t vocab,
                          int64_t dim, int64_t hidden_stride, int64_t weight_stride,
                          const float* temperatures, float temperature, const int64_t* seeds,
                          const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                          int64_t seed, int64_t offset, DType dtype, cudaStream_t stream) {
  if (std::max(std::max(rows, vocab), dim) > kMostColumns) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_divided(vocab, int64_t{kTokens}), size = rows * tiles;
  const Parts parts{floats, floats + size, columns, columns + size, tiles};
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  const cudaError_t status = for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Linear<T> linear{
        static_cast<const T*>(hidden),
        static_cast<const T*>(weight),
        static_cast<const T*>(bias),
        temperatures,
        static_cast<int>(rows),
        static_cast<int>(vocab),
        static_cast<int>(dim),
        hidden_stride,
        weight_stride,
        temperature,
        can_vectorise<kVector<T>>(addresses(hidden, weight), dim, hidden_stride, weight_stride)};
    return rows <= kFewRows ? launch_tiles<T, kFewRows>(parts, linear, draws, stream)
                            : launch_tiles<T, kManyRows>(parts, linear, draws, stream);
  });
  if (status != cudaSuccess) return status;
  return launch_rows(winner_kernel, Layout{kWinnerThreads, 1, 1, 0}, rows, 0, stream, tokens, parts,
                     temperatures, temperature);
}

}  // namespace tilewise
