// What both kernels of the backward pass do to a tile: of products to probabilities and gradients.
#pragma once

#include "cuda/attention/scores.cuh"

namespace tilewise {

// Of a query: the highest score and 1 / the sum of the powers of two above it, both 0 where there
// is nothing to attend to, and delta = sum(dout out) - dlse.
struct Statistics {
  float highest, part, delta;
};
constexpr int kStatistics = 3;

// What dk and dv are computed from.
template <typename T>
struct KeysBackward {
  Attention<T> a;
  Heads<T> dk, dv;
  Heads<const T> dout;
  const float* statistics;
};

// And the statistics and dq, which nobody may ask for.
template <typename T>
struct QueriesBackward {
  Attention<T> a;
  Heads<T> dq;
  float* statistics;
  Heads<const T> dout, out;
  const float *dlse, *highest, *total;
};

// Whether the kernels of Hopper take this, and on this GPU; and their launches.
template <typename T>
bool is_for_hopper(const KeysBackward<T>& b);
template <typename T>
cudaError_t hopper_keys_backward(const KeysBackward<T>& b, cudaStream_t stream);
template <typename T>
bool is_for_hopper(const QueriesBackward<T>& b);
template <typename T>
cudaError_t hopper_queries_backward(const QueriesBackward<T>& b, cudaStream_t stream);

// Copy those of the queries from query0 on of a head; of queries there are none of they are 0.
template <typename Queries>
__device__ void fetch_statistics(Queries& to, int queries, const float* from, int64_t count,
                                 int64_t head_row, int query0, int seq_q) {
#pragma unroll
  for (int i = threadIdx.x; i < kStatistics * queries; i += kAttentionThreads) {
    const int which = i / queries, r = i % queries;
    const bool inside = query0 + r < seq_q;
    const float* source = inside ? from + which * count + head_row + query0 + r : from;
    copy_async<4>(&to.beside(r).x + which, source, inside ? 4 : 0);
  }
}

// In the place of s = q k^T and ds = dout v^T, p, with kAveraged without what is dropped, and ds,
// before the scale: of the products if `steep`, else of what the cap makes of them. of(m, n, e)
// gives the statistics of a sum's query.
template <bool kScored, bool kChecked, bool kAveraged, typename T, bool kKeysDown, int kDown,
          int kAcross, typename Of>
__device__ void differentiate(Fragments<kDown, kAcross>& s, Fragments<kDown, kAcross>& ds,
                              const Scores<T>& scores, const Kept& kept,
                              const Pairs<kKeysDown>& pairs, bool steep, Of of) {
  constexpr int kSums = kDown * kAcross * 4;
  static_assert(kSums <= 32, "a bit for each");
  uint32_t dropped = 0;
  const auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int m = i / (kAcross * 4), n = i / 4 % kAcross, e = i % 4;
      body(s[m][n][e], ds[m][n][e], of(m, n, e), (dropped >> i & 1) != 0);
    }
  };
  const float factor = scores.a.template factor<kScored>();
  const Dropout& dropout = scores.a.options.dropout;
  if constexpr (kScored) {
    if (dropout.threshold) {
      kept.each<kDown, kAcross>(pairs, [&](int m, int n, int e, bool keep) {
        ds[m][n][e] = keep ? ds[m][n][e] * dropout.scale : 0.f;
        dropped |= (keep ? 0u : 1u) << ((m * kAcross + n) * 4 + e);
      });
    }
    each([](float&, float& dp, const Statistics& row, bool) { dp -= row.delta; });
    if (steep) {
      scores.cap_both(s, ds, pairs);
    } else {
      scores.cap(s, pairs);
    }
    scores.finish(s, pairs);
    each([factor](float& score, float& dp, const Statistics& row, bool drops) {
      const float p = exp2_approximate(score * factor - row.highest) * row.part;
      dp = p == 0.f ? 0.f : p * dp;  // of hidden keys it may be NaN
      score = kAveraged && drops ? 0.f : p;
    });
  } else {
    if constexpr (kChecked) scores.limit(s, pairs);
    each([factor](float& score, float& dp, const Statistics& row, bool) {
      score = exp2_approximate(score * factor - row.highest) * row.part;
      dp = score * (dp - row.delta);
    });
  }
}

}  // namespace tilewise
