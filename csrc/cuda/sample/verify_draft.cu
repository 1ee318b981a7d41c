// Speculative decoding, in two launches: of every drafted token whether it stands by itself, and of
// every sequence what comes after those that stand together. A position whose token is none is not
// read, and of a sequence only one more.
#include "cuda/sample/gumbel.cuh"
#include "cuda/sample/rows.cuh"
#include "sample_launchers.h"

namespace tilewise {
namespace {

// Past those of any token: the group of columns of the number that decides on a draft, and the
// first one of the noise of what takes its place.
constexpr uint32_t kAcceptance = 1u << 30, kReplacement = 1u << 31;

struct Drafts {
  const int64_t* tokens;  // [batch, count]
  const float* probabilities;
  int64_t count, vocab;

  __device__ bool is_token(int64_t number) const {
    return tokens[number] >= 0 && tokens[number] < vocab;
  }
  __device__ const float* row(int64_t number) const { return probabilities + number * vocab; }
};

__device__ inline Noise noise_at(const Draws& draws, int64_t sequence, int64_t place,
                                 uint32_t first_group) {
  Noise noise(draws, sequence);
  noise.offset += place;
  noise.first_group = first_group;
  return noise;
}

__device__ inline bool has_token(const Filters& filters, const Best& largest) {
  return filters.can && !largest.has_nan && largest.value > -INFINITY;
}

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, kCutBlocks)
    stands_kernel(int32_t* stands, Drafts drafts, Logits<T> logits, Draws draws) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t number = team.number(), sequence = number / drafts.count;
  const int64_t place = number - sequence * drafts.count, row = number + sequence;
  const bool is_first = cluster.rank == 0 && threadIdx.x == 0;
  if (!drafts.is_token(number)) {
    if (is_first) stands[number] = false;
    return team.leave();
  }
  const Filters filters = filters_of(logits.options, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);
  if (!has_token(filters, largest)) {
    if (is_first) stands[number] = false;
    return;
  }
  const Left left = left_of(cluster, bins, columns, filters, largest, true);
  const auto token = static_cast<int>(drafts.tokens[number]);
  if (threadIdx.x > 0 || token < columns.slice.begin || token >= columns.slice.end) return;
  const uint32_t word = noise_at(draws, sequence, place, kAcceptance).word(0);
  const double u = (word + 0.5) * 0x1p-32, q = drafts.row(number)[token];
  stands[number] = u * q < double{left.probability(columns.of(token), token)};
}

template <typename T, bool kHeld>
__global__ void __launch_bounds__(kRowThreads, kHeld ? kCutBlocks : 1)
    verdict_kernel(int64_t* accepted, int64_t* tokens, const int32_t* stands, Drafts drafts,
                   Logits<T> logits, Draws draws) {
  Team<Best> team(logits.blocks);
  TILEWISE_SHARED(bins, Bins);
  const Cluster cluster(logits.blocks);
  const int64_t sequence = team.number(), first = sequence * drafts.count;
  int64_t count = 0;
  while (count < drafts.count && stands[first + count]) ++count;
  const bool falls = count < drafts.count && drafts.is_token(first + count);
  const int64_t row = first + sequence + count;
  const Filters filters = filters_of(logits.options, row);
  Best largest;
  const auto columns = columns_of<kHeld>(logits, cluster, row, largest);
  largest = team.reduce(largest);

  int64_t last = -1;
  if (has_token(filters, largest)) {
    const Left left = left_of(cluster, bins, columns, filters, largest, true);
    const Noise noise = noise_at(draws, sequence, count, kReplacement);
    const float* q = falls ? drafts.row(first + count) : nullptr;
    const auto rest = [&](float v, int column) {  // what the target has more
      float p = left.probability(v, column);
      if (q && p > 0.f) p = __fsub_rn(p, q[column]);
      return p > 0.f ? logf(p) : -INFINITY;
    };
    Best best = team.reduce(draw(columns, Best::nothing(), noise, rest));
    if (best.column == kNoColumn) {  // there is none but by rounding
      q = nullptr;
      best = team.reduce(draw(columns, Best::nothing(), noise, rest));
    }
    last = best.column;
  }

  if (cluster.rank > 0) return;
  if (threadIdx.x == 0) accepted[sequence] = count;
  for (int64_t place = threadIdx.x; place <= drafts.count; place += blockDim.x) {
    const int64_t after = place == count ? last : -1;
    tokens[first + sequence + place] = place < count ? drafts.tokens[first + place] : after;
  }
}

}  // namespace

cudaError_t sample_verify(int64_t* accepted, int64_t* tokens, int32_t* stands,
                          const int64_t* draft_tokens, const float* draft_probabilities,
                          const void* x, int64_t batch, int64_t draft, int64_t vocab,
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
  const Drafts drafts{draft_tokens, draft_probabilities, draft, vocab};
  if (batch * draft > 0) {
    const cudaError_t status = for_logits(
        x, batch * draft, vocab, x_stride, options, dtype,
        [&](auto logits, const Regime& regime, auto held) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
          return launch_rows(stands_kernel<T, held.value>, regime.layout, batch * draft,
                             regime.shared_bytes(), stream, stands, drafts, logits, draws);
        });
    if (status != cudaSuccess) return status;
  }
  return for_logits(x, batch, vocab, x_stride, options, dtype,
                    [&](auto logits, const Regime& regime, auto held) {
                      using T = std::remove_const_t<std::remove_pointer_t<decltype(logits.x)>>;
                      return launch_rows(verdict_kernel<T, held.value>, regime.layout, batch,
                                         regime.shared_bytes(), stream, accepted, tokens, stands,
                                         drafts, logits, draws);
                    });
}

}  // namespace tilewise
