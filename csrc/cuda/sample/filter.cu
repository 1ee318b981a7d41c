// What is left of rows of logits after all filters, as logits or as probabilities.
#include "cuda/sample/rows.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

template <typename T>
struct Filtered {
  T* logits;  // or null, and then
  float* probabilities;
};

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, 2) filter_kernel(Filtered<T> out, Logits<T> logits) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number(), begin = row * logits.vocab;
  const Filters filters = filters_of(logits.options, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);

  const bool is_good = filters.can && !largest.has_nan, can = largest.value > -INFINITY;
  Left left{};
  if (is_good && can) {
    left = left_of(cluster, bins, columns, filters, largest, out.probabilities != nullptr);
  }
  const float scale = filters.temperature > 0.f ? filters.temperature : 1.f;
  columns.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i >= columns.slice.end) continue;
      if (out.probabilities) {
        out.probabilities[begin + col + i] = is_good && can ? left.probability(v[i], col + i) : NAN;
      } else {
        const bool is_kept = can && left.keeps(v[i], col + i);
        const float kept = is_kept ? __fdiv_rn(v[i], scale) : -INFINITY;
        out.logits[begin + col + i] = from_float<T>(is_good ? kept : NAN);
      }
    }
  });
}

}  // namespace

cudaError_t sample_filter(void* kept, float* probabilities, const void* x, int64_t rows,
                          int64_t vocab, int64_t x_stride, const int64_t* each_top_k,
                          const float* temperatures, const float* top_ps, const float* min_ps,
                          const float* repetitions, const float* presences,
                          const float* frequencies, const int64_t* history, int64_t length,
                          const float* bias, int64_t bias_stride, const int32_t* mask,
                          int64_t mask_stride, int64_t top_k, float temperature, float top_p,
                          float min_p, float repetition, float presence, float frequency,
                          DType dtype, cudaStream_t stream) {
  const SampleOptions options{
      each_top_k,  temperatures, top_ps,      min_ps,
      repetitions, presences,    frequencies, history,
      length,      bias,         bias_stride, reinterpret_cast<const uint32_t*>(mask),
      mask_stride, top_k,        temperature, top_p,
      min_p,       repetition,   presence,    frequency};
  return for_logits(
      x, rows, vocab, x_stride, options, dtype, [&](auto logits, const Regime& regime, auto held) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
        return launch_rows(filter_kernel<T, held.value>, regime.layout, rows, regime.shared_bytes(),
                           stream, Filtered<T>{static_cast<T*>(kept), probabilities}, logits);
      });
}

}  // namespace tilewise
