// The likeliest tokens in rank, of rows by themselves, or with their logarithms beside a draw.
#include "cuda/sample/listed.cuh"
#include "cuda/sample/rows.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, 2)
    top_k_kernel(T* values, int64_t* indices, uint64_t* room, Logits<T> logits, int64_t wanted,
                 int64_t room_stride) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number();
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);
  int count;
  const uint64_t* listed =
      first_in_rank(cluster, bins, columns, largest.has_nan ? NAN : largest.value, no_cut(), wanted,
                    room + row * room_stride, count);
  if (!listed) return;
  const T* x = logits.x + row * logits.x_stride;
  for (int n = threadIdx.x; n < wanted; n += blockDim.x) {
    const auto column = static_cast<uint32_t>(listed[n]);
    values[row * wanted + n] = x[column];
    indices[row * wanted + n] = column;
  }
}

struct Logprobs {
  float *of_token, *of_first;
  int64_t* first;
  const int64_t* tokens;
  int64_t wanted, room_stride;
  uint64_t* room;
  bool is_processed;
};

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, kCutBlocks)
    logprobs_kernel(Logprobs out, Logits<T> logits) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t row = team.number(), token = out.tokens[row];
  const Filters filters = filters_of(logits.options, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);

  float* of_first = out.of_first + row * out.wanted;
  int64_t* first = out.first + row * out.wanted;
  if (token < 0 || largest.has_nan || (!out.is_processed && largest.value == INFINITY)) {
    if (cluster.rank > 0) return;
    if (threadIdx.x == 0) out.of_token[row] = NAN;
    for (int64_t n = threadIdx.x; n < out.wanted; n += blockDim.x) {
      of_first[n] = NAN;
      first[n] = -1;
    }
    return;
  }
  const Cut cut = out.is_processed ? cut_of(cluster, bins, columns, filters, largest) : no_cut();
  const Masses masses{largest.value, filters.temperature};
  const uint64_t all = mass_of(cluster, bins, columns, masses, cut);
  const float log_of_mass = logf(static_cast<float>(all) * 0x1p-40f);
  columns.each([&](int col, const float (&v)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i == token) out.of_token[row] = masses.gap(v[i]) - log_of_mass;
    }
  });
  if (out.wanted == 0) return;
  int count;
  const uint64_t* listed = first_in_rank(cluster, bins, columns, largest.value, cut, out.wanted,
                                         out.room + row * out.room_stride, count);
  if (!listed) return;
  for (int n = threadIdx.x; n < out.wanted; n += blockDim.x) {
    const uint64_t place = n < count ? listed[n] : 0;
    const float v = from_ordered(~static_cast<uint32_t>(place >> 32));
    const float value = n < count ? masses.gap(v) - log_of_mass : -INFINITY;
    of_first[n] = value;
    first[n] = value > -INFINITY ? static_cast<int64_t>(static_cast<uint32_t>(place)) : -1;
  }
}

}  // namespace

cudaError_t sample_top_k(void* values, int64_t* indices, int64_t* room, const void* x, int64_t rows,
                         int64_t vocab, int64_t x_stride, int64_t wanted, int64_t room_stride,
                         DType dtype, cudaStream_t stream) {
  return for_logits(x, rows, vocab, x_stride, SampleOptions{}, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(top_k_kernel<T, held.value>, regime.layout, rows,
                                         regime.shared_bytes(), stream, static_cast<T*>(values),
                                         indices, reinterpret_cast<uint64_t*>(room), logits, wanted,
                                         room_stride);
                    });
}

cudaError_t sample_logprobs(float* of_token, float* of_first, int64_t* first, int64_t* room,
                            const int64_t* tokens, const void* x, int64_t rows, int64_t vocab,
                            int64_t x_stride, int64_t wanted, int64_t room_stride,
                            bool is_processed, const int64_t* each_top_k, const float* temperatures,
                            const float* top_ps, const float* min_ps, const float* repetitions,
                            const float* presences, const float* frequencies,
                            const int64_t* history, int64_t length, const float* bias,
                            int64_t bias_stride, const int32_t* mask, int64_t mask_stride,
                            int64_t top_k, float temperature, float top_p, float min_p,
                            float repetition, float presence, float frequency, DType dtype,
                            cudaStream_t stream) {
  const SampleOptions options{
      each_top_k,  temperatures, top_ps,      min_ps,
      repetitions, presences,    frequencies, history,
      length,      bias,         bias_stride, reinterpret_cast<const uint32_t*>(mask),
      mask_stride, top_k,        temperature, top_p,
      min_p,       repetition,   presence,    frequency};
  const Logprobs out{
      of_token,    of_first, first, tokens, wanted, room_stride, reinterpret_cast<uint64_t*>(room),
      is_processed};
  return for_logits(x, rows, vocab, x_stride, options, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(logprobs_kernel<T, held.value>, regime.layout, rows,
                                         regime.shared_bytes(), stream, out, logits);
                    });
}

}  // namespace tilewise
