// Draws of tokens: a team of blocks takes a row, reads it once and holds it.
#include "cuda/sample/gumbel.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

template <typename T>
struct Sample {
  int64_t* tokens;
  const T* x;
  int64_t vocab, x_stride;
  SampleOptions options;
  Draws draws;
  int64_t slice;
  int blocks;    // of a row
  bool is_wide;  // whether accesses to x are aligned, and to be had in whole
};

// What a block draws from: its slice in shared memory, or where it was given.
template <typename T, bool kHeld>
__device__ auto columns_of(const Sample<T>& sample, const Slice& slice, const T* x_row, int64_t row,
                           Best& best) {
  const int vocab = static_cast<int>(sample.vocab);
  if constexpr (kHeld) {
    float* held = dynamic_shared();
    best = write_slice(held, x_row, sample.is_wide, slice, sample.options, row);
    __syncthreads();
    return Columns<float>{held, slice, vocab, true};
  } else {
    const Columns<T> columns{x_row + slice.begin, slice, vocab, sample.is_wide};
    best = largest_of(columns);
    return columns;
  }
}

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, 2) draw_kernel(Sample<T> sample) {
  Team<Best> team(sample.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(sample.blocks);
  const int64_t row = team.number();
  const T* x_row = sample.x + row * sample.x_stride;
  const Slice slice(cluster, sample.slice, sample.vocab);
  const Filters filters = filters_of(sample.options, row);
  Best largest;
  const auto columns = columns_of<T, kHeld>(sample, slice, x_row, row, largest);
  largest = team.reduce(largest);

  const bool can = filters.can && !largest.has_nan && largest.value > -INFINITY;
  Best best = largest;
  if (can && !filters.is_greedy()) {
    const Cut cut = cut_of(cluster, bins, columns, filters, largest);
    const Masses masses{largest.value, filters.temperature};
    best = team.reduce(draw(columns, masses, largest, cut, Noise(sample.draws, row)));
  }
  if (cluster.rank == 0 && threadIdx.x == 0) sample.tokens[row] = can ? best.column : -1;
}

template <typename T>
cudaError_t draw(const Regime& regime, int64_t rows, const Sample<T>& sample, cudaStream_t stream) {
  return regime.is_held
             ? launch_rows(draw_kernel<T, true>, regime.layout, rows, regime.shared_bytes(), stream,
                           sample)
             : launch_rows(draw_kernel<T, false>, regime.layout, rows, 0, stream, sample);
}

template <typename T>
struct Adjustment {
  float* y;
  const T* x;
  int64_t vocab, x_stride;
  SampleOptions options;
  bool is_wide;
};

// Rows that no cluster can hold, as they are drawn from.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) adjust_kernel(Adjustment<T> adjustment) {
  const int64_t row = blockIdx.x;
  const Slice slice(Cluster(1), adjustment.vocab, adjustment.vocab);
  write_slice(adjustment.y + row * padded(adjustment.vocab),
              adjustment.x + row * adjustment.x_stride, adjustment.is_wide, slice,
              adjustment.options, row);
}

}  // namespace

bool sample_is_held(int64_t rows, int64_t vocab) { return regime_of(rows, vocab).is_held; }

cudaError_t sample_forward(int64_t* tokens, float* adjusted, const void* x, int64_t rows,
                           int64_t vocab, int64_t x_stride, const int64_t* each_top_k,
                           const float* temperatures, const float* top_ps, const float* min_ps,
                           const float* repetitions, const float* presences,
                           const float* frequencies, const int64_t* history, int64_t length,
                           const float* bias, int64_t bias_stride, const int32_t* mask,
                           int64_t mask_stride, int64_t top_k, float temperature, float top_p,
                           float min_p, float repetition, float presence, float frequency,
                           const int64_t* seeds, const int64_t* offsets, int64_t seed_stride,
                           int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
                           cudaStream_t stream) {
  const SampleOptions options{
      each_top_k,  temperatures, top_ps,      min_ps,
      repetitions, presences,    frequencies, history,
      length,      bias,         bias_stride, reinterpret_cast<const uint32_t*>(mask),
      mask_stride, top_k,        temperature, top_p,
      min_p,       repetition,   presence,    frequency};
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  if (vocab > kMostColumns) return cudaErrorInvalidValue;
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Regime regime = regime_of(rows, vocab);
    const auto* given = static_cast<const T*>(x);
    const bool is_wide = can_vectorise<kVector<T>>(addresses(x), x_stride);
    if (regime.is_held || !options.adjust()) {
      return draw(
          regime, rows,
          Sample<T>{tokens, given, vocab, x_stride, options, draws, regime.slice,
                    regime.layout.blocks, is_wide && (regime.is_held || vocab % kGroup == 0)},
          stream);
    }
    const Layout whole{kRowThreads, 1, 1, 0};
    const cudaError_t status =
        launch_rows(adjust_kernel<T>, whole, rows, 0, stream,
                    Adjustment<T>{adjusted, given, vocab, x_stride, options, is_wide});
    if (status != cudaSuccess) return status;
    return draw(regime, rows,
                Sample<float>{tokens, adjusted, vocab, padded(vocab), options.without_adjustments(),
                              draws, regime.slice, regime.layout.blocks,
                              can_vectorise<kGroup>(addresses(adjusted))},
                stream);
  });
}

}  // namespace tilewise
