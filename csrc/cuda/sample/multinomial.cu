// Several draws from each row: one after the other, or all at once and none of them twice.
#include "cuda/sample/gumbel.cuh"
#include "cuda/sample/listed.cuh"
#include "cuda/sample/rows.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

// Weights, from column `column` on, to their logarithms, and what is no weight to NaN; with noise,
// to the scores by which draws are ranked.
template <int kWidth>
__device__ void to_logs(float (&v)[kWidth], int column, const Noise& noise, bool has_noise) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] = v[i] < INFINITY ? logf(v[i]) : NAN;
  if (!has_noise) return;
#pragma unroll
  for (int i = 0; i < kWidth; i += kGroup) {
    const PhiloxWords drawn = noise.words(column + i);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) v[i + k] += gumbel(drawn.at[k]);
  }
}

// What is given as weights comes to a block as their logarithms.
template <bool kHeld, typename T>
__device__ auto columns_of(const Logits<T>& logits, const Cluster& cluster, int64_t row, Best& best,
                           const Noise& noise, bool are_weights, bool has_noise) {
  return columns_of<kHeld>(
      logits, cluster, row, best, [&](float* to, const T* x, const Slice& slice) {
        return write_changed(to, x, logits.is_wide, slice, [&](auto& v, int j) {
          if (are_weights) to_logs(v, slice.begin + j, noise, has_noise);
        });
      });
}

// `teams` share the draws from a row, each of which holds all of it.
template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, kHeld ? 2 : 1)
    several_kernel(int64_t* places, Logits<T> logits, Draws draws, int64_t count, int64_t teams,
                   bool are_weights) {
  Team<Best> team(logits.blocks);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number() / teams, first = team.number() % teams;
  Noise noise(draws, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest, noise, are_weights, false);
  largest = team.reduce(largest);

  const bool can = !largest.has_nan && largest.value > -INFINITY;
  const Masses masses{largest.value, 1.f};
  const uint64_t offset = noise.offset;
  for (int64_t n = first; n < count; n += teams) {
    noise.offset = offset + n;
    Best best = largest;
    if (can) best = team.reduce(draw(columns, masses, largest, no_cut(), noise));
    if (cluster.rank == 0 && threadIdx.x == 0) places[row * count + n] = can ? best.column : -1;
  }
}

// The first in rank, once each has its noise: what is not weights has it already.
template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, 2)
    distinct_kernel(int64_t* places, uint64_t* room, Logits<T> logits, Draws draws, int64_t count,
                    int64_t room_stride, bool are_weights) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number();
  Best largest;
  const auto columns =
      columns_of<kHeld>(logits, cluster, row, largest, Noise(draws, row), are_weights, true);
  largest = team.reduce(largest);

  places += row * count;
  if (largest.has_nan) {
    if (cluster.rank > 0) return;
    for (int64_t n = threadIdx.x; n < count; n += blockDim.x) places[n] = -1;
    return;
  }
  int found;
  const uint64_t* listed = first_in_rank(cluster, bins, columns, largest.value, no_cut(), count,
                                         room + row * room_stride, found);
  if (!listed) return;
  for (int n = threadIdx.x; n < count; n += blockDim.x) {
    const bool can = from_ordered(~static_cast<uint32_t>(listed[n] >> 32)) > -INFINITY;
    places[n] = can ? static_cast<int64_t>(static_cast<uint32_t>(listed[n])) : -1;
  }
}

// Rows that no cluster can hold, as they are drawn from.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2)
    scores_kernel(float* y, const T* x, int64_t vocab, int64_t x_stride, Draws draws,
                  bool has_noise, bool is_wide) {
  const int64_t row = blockIdx.x;
  const Noise noise(draws, row);
  write_changed(y + row * padded(vocab), x + row * x_stride, is_wide,
                Slice(Cluster(1), vocab, vocab),
                [&](auto& v, int j) { to_logs(v, j, noise, has_noise); });
}

}  // namespace

cudaError_t sample_scores(float* y, const void* x, int64_t rows, int64_t vocab, int64_t x_stride,
                          bool has_noise, const int64_t* seeds, const int64_t* offsets,
                          int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset,
                          DType dtype, cudaStream_t stream) {
  if (vocab > kMostColumns) return cudaErrorInvalidValue;
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool is_wide = can_vectorise<kVector<T>>(addresses(x), x_stride);
    return launch_rows(scores_kernel<T>, Layout{kRowThreads, 1, 1, 0}, rows, 0, stream, y,
                       static_cast<const T*>(x), vocab, x_stride, draws, has_noise, is_wide);
  });
}

cudaError_t sample_several(int64_t* places, const void* x, int64_t rows, int64_t vocab,
                           int64_t x_stride, int64_t count, bool are_weights, const int64_t* seeds,
                           const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                           int64_t seed, int64_t offset, DType dtype, cudaStream_t stream) {
  if (are_weights && !sample_is_held(rows, vocab)) return cudaErrorInvalidValue;
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  const int64_t blocks = std::max<int64_t>(rows * regime_of(rows, vocab).layout.blocks, 1);
  const int64_t teams =
      std::max<int64_t>(std::min(count, ceil_divided(kFewBlocksOfAll, blocks)), 1);
  return for_logits(x, rows * teams, vocab, x_stride, SampleOptions{}, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(several_kernel<T, held.value>, regime.layout, rows * teams,
                                         regime.shared_bytes(), stream, places, logits, draws,
                                         count, teams, are_weights);
                    });
}

cudaError_t sample_distinct(int64_t* places, int64_t* room, const void* x, int64_t rows,
                            int64_t vocab, int64_t x_stride, int64_t count, int64_t room_stride,
                            bool are_weights, const int64_t* seeds, const int64_t* offsets,
                            int64_t seed_stride, int64_t offset_stride, int64_t seed,
                            int64_t offset, DType dtype, cudaStream_t stream) {
  if (are_weights && !sample_is_held(rows, vocab)) return cudaErrorInvalidValue;
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  return for_logits(x, rows, vocab, x_stride, SampleOptions{}, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(distinct_kernel<T, held.value>, regime.layout, rows,
                                         regime.shared_bytes(), stream, places,
                                         reinterpret_cast<uint64_t*>(room), logits, draws, count,
                                         room_stride, are_weights);
                    });
}

}  // namespace tilewise
