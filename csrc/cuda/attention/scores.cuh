// From products to scores; and which probabilities dropout keeps.
#pragma once

#include "cuda/attention/tiles.cuh"

namespace tilewise {

// The pairs of a query and a key that a lane has sums of: its queries down and its keys across, or
// the other way round.
template <bool kKeysDown>
struct Pairs {
  int query, key;  // of its first sum

  // Of a tile that begins at these, by the warp that has its rows from `row` on.
  __device__ static Pairs of(int query0, int key0, int row) {
    const int lane = threadIdx.x % kWarpSize;
    const int down = row + lane / 4, across = 2 * (lane % 4);
    return {query0 + (kKeysDown ? across : down), key0 + (kKeysDown ? down : across)};
  }
};

// Call body(sum, query, key) with each sum of this lane.
template <bool kKeysDown, int kDown, int kAcross, typename Body>
__device__ void for_pairs(Fragments<kDown, kAcross>& s, const Pairs<kKeysDown>& pairs, Body body) {
#pragma unroll
  for (int m = 0; m < kDown; ++m) {
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int down = 16 * m + 8 * (e / 2), across = 8 * n + e % 2;
        body(s[m][n][e], pairs.query + (kKeysDown ? across : down),
             pairs.key + (kKeysDown ? down : across));
      }
    }
  }
}

// Hide what is outside of the keys, of causality and of the window.
template <bool kKeysDown, int kDown, int kAcross>
__device__ void hide_outside(Fragments<kDown, kAcross>& s, const Pairs<kKeysDown>& pairs, int ahead,
                             int left, int right, int seq_k) {
  for_pairs(s, pairs, [&](float& score, int query, int key) {
    const int place = query + ahead;
    const int begin = left < 0 ? 0 : place - left;
    const int end = right < 0 ? seq_k : min(seq_k, place + right + 1);
    if (key < begin || key >= end) score = -INFINITY;
  });
}

// Of one head: its part of what is added to scores, and what hides them.
template <typename T>
struct Scores {
  const Attention<T>& a;
  const Block& block;
  const uint8_t *mask, *shown;  // shown: keys that are hidden from all queries alike have a 0 here
  const void* bias;
  float slope;

  __device__ Scores(const Attention<T>& attention, const Block& of, int head)
      : a(attention), block(of) {
    const int batch = block.batch;
    const Options& o = a.options;
    const Strides &m = o.mask_strides, &b = o.bias_strides;
    mask = o.mask ? o.mask + batch * m.batch + head * m.head : nullptr;
    shown = m.query == 0 ? mask : nullptr;
    const int64_t skipped = batch * b.batch + head * b.head;
    bias = !o.bias         ? nullptr
           : o.bias_single ? static_cast<const void*>(static_cast<const float*>(o.bias) + skipped)
                           : static_cast<const void*>(static_cast<const T*>(o.bias) + skipped);
    slope = o.slopes ? o.slopes[batch * o.slopes_batch + head * o.slopes_head] : 0.f;
  }

  __device__ float sink(int head) const {
    const Options& o = a.options;
    return o.sinks_single ? static_cast<const float*>(o.sinks)[head]
                          : to_float(static_cast<const T*>(o.sinks)[head]);
  }

  template <bool kKeysDown, int kDown, int kAcross>
  __device__ void limit(Fragments<kDown, kAcross>& s, const Pairs<kKeysDown>& pairs) const {
    hide_outside(s, pairs, block.ahead(), a.options.left, a.options.right, block.seq_k);
  }

  // Products, scaled and capped, to scores.
  template <bool kKeysDown, int kDown, int kAcross>
  __device__ void finish(Fragments<kDown, kAcross>& s, const Pairs<kKeysDown>& pairs) const {
    const auto inside = [&](int query, int key) {
      return query < block.seq_q && key < block.seq_k;
    };
    if (bias) {
      const int64_t down = a.options.bias_strides.query, across = a.options.bias_strides.col;
      const auto add = [&](const auto* values) {
        for_pairs(s, pairs, [&](float& score, int query, int key) {
          if (inside(query, key)) score += to_float(values[query * down + key * across]);
        });
      };
      if (a.options.bias_single) {
        add(static_cast<const float*>(bias));
      } else {
        add(static_cast<const T*>(bias));
      }
    }
    if (a.options.slopes) {
      const int ahead = block.ahead();
      for_pairs(s, pairs, [&](float& score, int query, int key) {
        score -= slope * static_cast<float>(abs(query + ahead - key));
      });
    }
    if (mask) {
      const int64_t down = a.options.mask_strides.query, across = a.options.mask_strides.col;
      for_pairs(s, pairs, [&](float& score, int query, int key) {
        if (!inside(query, key) || !mask[query * down + key * across]) score = -INFINITY;
      });
    }
    limit(s, pairs);
  }

  // Scale and cap products.
  template <bool kKeysDown, int kDown, int kAcross>
  __device__ void cap(Fragments<kDown, kAcross>& s, const Pairs<kKeysDown>& pairs) const {
    const float softcap = a.options.softcap;
    const float inner = softcap == 0.f ? a.scale : a.scale / softcap;
    for_pairs(s, pairs, [&](float& score, int, int) { score *= inner; });
    if (softcap == 0.f) return;
    for_pairs(s, pairs, [&](float& score, int, int) { score = softcap * tanhf(score); });
  }

  // The same, and multiply what is to become the gradients of these scores by how much less these
  // grow near the cap.
  template <bool kKeysDown, int kDown, int kAcross>
  __device__ void cap_both(Fragments<kDown, kAcross>& s, Fragments<kDown, kAcross>& ds,
                           const Pairs<kKeysDown>& pairs) const {
    cap(s, pairs);
    if (a.options.softcap == 0.f) return;
    const float bound = 1.f / a.options.softcap;
#pragma unroll
    for (int i = 0; i < kDown * kAcross * 4; ++i) {
      const int m = i / (kAcross * 4), n = i / 4 % kAcross, e = i % 4;
      const float t = s[m][n][e] * bound;
      ds[m][n][e] *= 1.f - t * t;
    }
  }
};

// The word of four with this number, without an address of a register.
__device__ inline uint32_t pick(const PhiloxWords& words, int i) {
  const uint32_t low = i % 2 ? words.at[1] : words.at[0];
  const uint32_t high = i % 2 ? words.at[3] : words.at[2];
  return i < 2 ? low : high;
}

// Which probabilities of one head dropout keeps. Lanes that want words of the same counter share
// the work: each computes some of the words, and they exchange them.
struct Kept {
  uint64_t seed, offset, threshold;
  uint32_t row;  // of the head's first query

  __device__ Kept(const Dropout& dropout, int64_t index, int seq_q)
      : seed(dropout.seeds ? dropout.seeds[0] : dropout.seed),
        offset(dropout.offsets ? dropout.offsets[0] : dropout.offset),
        threshold(dropout.threshold),
        row(static_cast<uint32_t>(index * seq_q)) {}

  __device__ PhiloxWords words(int query, int key) const {
    return philox(seed, offset, row + query, static_cast<uint32_t>(key) / kPhiloxGroup);
  }

  // Call body(m, n, e, kept) with each sum of this lane.
  template <int kDown, int kAcross, bool kKeysDown, typename Body>
  __device__ void each(const Pairs<kKeysDown>& pairs, Body body) const {
#pragma unroll
    for (int m = 0; m < kDown; ++m) {
#pragma unroll
      for (int n = 0; n < kAcross; ++n) {
        uint32_t own[4];
        if constexpr (kKeysDown) {
          exchange_keys(own, pairs.query + 8 * n, pairs.key + 16 * m);
        } else {
          exchange_queries(own, pairs.query + 16 * m, pairs.key + 8 * n);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) body(m, n, e, keep(own[e], threshold));
      }
    }
  }

 private:
  // Of two queries and two neighbouring keys: the lane beside this one has the other two of four.
  __device__ void exchange_queries(uint32_t (&own)[4], int query, int key) const {
    const int odd = threadIdx.x % 2;
    const PhiloxWords w = words(query + 8 * odd, key);
    const uint32_t low = __shfl_xor_sync(0xffffffff, odd ? w.at[0] : w.at[2], 1);
    const uint32_t high = __shfl_xor_sync(0xffffffff, odd ? w.at[1] : w.at[3], 1);
    own[0] = odd ? low : w.at[0];
    own[1] = odd ? high : w.at[1];
    own[2] = odd ? w.at[2] : low;
    own[3] = odd ? w.at[3] : high;
  }

  // Of two neighbouring queries and two keys, eight apart: four lanes, four apart, have the four
  // words of each counter among them, and each computes one counter.
  __device__ void exchange_keys(uint32_t (&own)[4], int query, int key) const {
    const int place = threadIdx.x / 4 % 4;
    const PhiloxWords w = words(query + place % 2, key + 8 * (place / 2));
    uint32_t got[4];  // from the lane whose place differs by that number's bits
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      got[x] = pick(w, place ^ x);
      if (x) got[x] = __shfl_xor_sync(0xffffffff, got[x], 4 * x);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) own[e] = pick({{got[0], got[1], got[2], got[3]}}, place ^ e);
  }
};

}  // namespace tilewise
