// Draws of tokens: a team of blocks takes a row, reads it once and holds it.
#include "cuda/sample/gumbel.cuh"
#include "cuda/sample/rows.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, kHeld ? 2 : 1)
    draw_kernel(int64_t* tokens, Logits<T> logits, Draws draws) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number();
  const Filters filters = filters_of(logits.options, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);

  const bool can = filters.can && !largest.has_nan && largest.value > -INFINITY;
  Best best = largest;
  if (can && !filters.is_greedy()) {
    const Cut cut = cut_of(cluster, bins, columns, filters, largest);
    const Masses masses{largest.value, filters.temperature};
    best = team.reduce(draw(columns, masses, largest, cut, Noise(draws, row)));
  }
  if (cluster.rank == 0 && threadIdx.x == 0) tokens[row] = can ? best.column : -1;
}

// Rows that no cluster can hold, as they are drawn from.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2)
    adjust_kernel(float* y, const T* x, int64_t vocab, int64_t x_stride, SampleOptions options,
                  bool is_wide) {
  const int64_t row = blockIdx.x;
  const Slice slice(Cluster(1), vocab, vocab);
  write_slice(y + row * padded(vocab), x + row * x_stride, is_wide, slice, options, row);
}

}  // namespace

bool sample_is_held(int64_t rows, int64_t vocab) { return regime_of(rows, vocab).is_held; }

cudaError_t sample_adjust(float* y, const void* x, int64_t rows, int64_t vocab, int64_t x_stride,
                          const float* repetitions, const float* presences,
                          const float* frequencies, const int64_t* history, int64_t length,
                          const float* bias, int64_t bias_stride, const int32_t* mask,
                          int64_t mask_stride, float repetition, float presence, float frequency,
                          DType dtype, cudaStream_t stream) {
  if (vocab > kMostColumns) return cudaErrorInvalidValue;
  SampleOptions options{};
  options.repetitions = repetitions;
  options.presences = presences;
  options.frequencies = frequencies;
  options.history = history;
  options.length = length;
  options.bias = bias;
  options.bias_stride = bias_stride;
  options.mask = reinterpret_cast<const uint32_t*>(mask);
  options.mask_stride = mask_stride;
  options.repetition = repetition;
  options.presence = presence;
  options.frequency = frequency;
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool is_wide = can_vectorise<kVector<T>>(addresses(x), x_stride);
    return launch_rows(adjust_kernel<T>, Layout{kRowThreads, 1, 1, 0}, rows, 0, stream, y,
                       static_cast<const T*>(x), vocab, x_stride, options, is_wide);
  });
}

cudaError_t sample_forward(int64_t* tokens, const void* x, int64_t rows, int64_t vocab,
                           int64_t x_stride, const int64_t* each_top_k, const float* temperatures,
                           const float* top_ps, const float* min_ps, const float* repetitions,
                           const float* presences, const float* frequencies, const int64_t* history,
                           int64_t length, const float* bias, int64_t bias_stride,
                           const int32_t* mask, int64_t mask_stride, int64_t top_k,
                           float temperature, float top_p, float min_p, float repetition,
                           float presence, float frequency, const int64_t* seeds,
                           const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                           int64_t seed, int64_t offset, DType dtype, cudaStream_t stream) {
  const SampleOptions options{
      each_top_k,  temperatures, top_ps,      min_ps,
      repetitions, presences,    frequencies, history,
      length,      bias,         bias_stride, reinterpret_cast<const uint32_t*>(mask),
      mask_stride, top_k,        temperature, top_p,
      min_p,       repetition,   presence,    frequency};
  const Draws draws{seeds, offsets, seed_stride, offset_stride, seed, offset};
  return for_logits(x, rows, vocab, x_stride, options, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(draw_kernel<T, held.value>, regime.layout, rows,
                                         regime.shared_bytes(), stream, tokens, logits, draws);
                    });
}

}  // namespace tilewise
