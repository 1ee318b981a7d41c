// RMSNorm and LayerNorm, forward: what differs is whether the mean is taken off. Either may first
// add x to a residual, and then normalises the sum as it is returned.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/layout.cuh"
#include "cuda/span.cuh"

namespace tilewise {

// A weight or a bias, [cols]: like x, in fp32, or missing.
struct Parameter {
  const void* at;
  bool is_single;
};

// What a parameter beside a T has at a column; `otherwise` where it is missing.
template <typename T, typename Span>
__device__ void load_parameter(float (&out)[Span::kWidth], const Parameter& parameter,
                               const Span& span, typename Span::Column col, float otherwise) {
  if (!parameter.at) {
#pragma unroll
    for (int i = 0; i < Span::kWidth; ++i) out[i] = otherwise;
  } else if (parameter.is_single) {
    unpack(out, span.read(static_cast<const float*>(parameter.at), col, false));
  } else {
    unpack(out, span.read(static_cast<const T*>(parameter.at), col, false));
  }
}

// values[at - by], zero outside; `at` is known when compiled, `by` is 0 to 3.
template <int kCount>
__device__ float shifted(const float (&values)[kCount], int at, int by) {
  const auto value = [&](int i) { return 0 <= i && i < kCount ? values[i] : 0.f; };
  return by < 2 ? (by == 0 ? value(at) : value(at - 1)) : (by == 2 ? value(at - 2) : value(at - 3));
}

// Drop out of an access. Columns share counters by four, and it may begin within a group.
template <typename Span>
__device__ void drop_access(float (&v)[Span::kWidth], const Dropout& dropout, int64_t row,
                            typename Span::Column col) {
  if constexpr (Span::kExact) {
    drop(v, dropout, row, col);
  } else if (dropout.threshold) {
    float groups[Span::kWidth + kPhiloxGroup];
    const int within = static_cast<int>(col & (kPhiloxGroup - 1));
#pragma unroll
    for (int i = 0; i < Span::kWidth + kPhiloxGroup; ++i) groups[i] = shifted(v, i, within);
    drop(groups, dropout, row, col - within);
#pragma unroll
    for (int i = 0; i < Span::kWidth; ++i) v[i] = shifted(groups, i + 3, 3 - within);
  }
}

struct NormForward {
  void *y, *sum;       // T, R: no sum where nothing is added
  float *mean, *rstd;  // no mean where it is not taken off
  const void *x, *residual;
  Parameter weight, bias;
  Places places;  // of the rows of x
  int64_t rows, cols, residual_stride;
  float eps, weight_offset;
  bool is_llama;  // whether the normalised row is rounded before it is weighted, and then each step
  Dropout dropout;
  int blocks;  // of a row; this and what follows is the launch's to say
  bool once;   // whether what is written is too long to stay in L2
};

// The mean square of a row comes of its sum of squares, its variance of its moments.
template <bool kCentred>
using Spread = std::conditional_t<kCentred, Moments, Sums<1>>;

template <bool kCentred, typename T, typename Span>
__device__ Spread<kCentred> spread_of(const Span& span, const Held<T, Span>& x) {
  float v[Span::kWidth];
  float squares = 0.f;
  if constexpr (kCentred) {
    float sum = 0.f, count = 0.f;
    span.each([&](int k, auto col) {
      x.get(v, k);
#pragma unroll
      for (int i = 0; i < Span::kWidth; ++i) {
        sum += v[i];
        count += span.has(col, i) ? 1.f : 0.f;
      }
    });
    const float mean = count > 0.f ? sum / count : 0.f;
    span.each([&](int k, auto col) {
      x.get(v, k);
#pragma unroll
      for (int i = 0; i < Span::kWidth; ++i) {
        if (span.has(col, i)) squares += (v[i] - mean) * (v[i] - mean);
      }
    });
    return {count, mean, squares};
  } else {
    span.each([&](int k, auto) {
      x.get(v, k);
#pragma unroll
      for (int i = 0; i < Span::kWidth; ++i) squares += v[i] * v[i];
    });
    return {squares};
  }
}

// xhat * (weight_offset + weight) + bias, in place.
template <typename T, typename Span>
__device__ void weigh(float (&v)[Span::kWidth], const NormForward& norm, const Span& span,
                      typename Span::Column col) {
  float w[Span::kWidth], b[Span::kWidth];
  load_parameter<T>(w, norm.weight, span, col, 1.f);
  load_parameter<T>(b, norm.bias, span, col, 0.f);
  const bool is_single = norm.weight.is_single;
  const auto rounded = [](float value, bool is_exact) {
    return is_exact ? value : to_float(from_float<T>(value));
  };
#pragma unroll
  for (int i = 0; i < Span::kWidth; ++i) {
    w[i] += norm.weight_offset;
    if (norm.is_llama) {
      v[i] = rounded(v[i], false);
      if (norm.weight.at) v[i] = rounded(v[i] * rounded(w[i], is_single), is_single);
      v[i] += b[i];
    } else {
      v[i] = v[i] * w[i] + b[i];
    }
  }
}

template <bool kAdds, int kHeld>
constexpr bool is_for_few = !kAdds && kHeld <= kFewHeld;

namespace {

// Without a sum R is T.
template <bool kCentred, bool kAdds, typename T, typename R, int kHeld, bool kExact>
__global__ void __launch_bounds__(is_for_few<kAdds, kHeld> ? kNarrowThreads : kTeamThreads,
                                  is_for_few<kAdds, kHeld> ? kFewBlocks : 1)
    norm_forward_kernel(NormForward norm) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Spread<kCentred>> team(norm.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < norm.rows;
  const T* x_row = static_cast<const T*>(norm.x) + (there ? norm.places.of(row) : 0);
  const R* residual_row = static_cast<const R*>(norm.residual) + row * norm.residual_stride;
  R* sum_row = static_cast<R*>(norm.sum) + row * norm.cols;
  T* y_row = static_cast<T*>(norm.y) + row * norm.cols;
  Columns span(norm.cols, kExact ? 0 : misaligned_by(y_row), team);
  span.begin(there);

  Held<R, Columns> x;  // what is normalised
  bool is_summed = false;
  const auto fetch = [&] {
    if constexpr (kAdds) {
      if (is_summed) return x.fetch(span, sum_row);
      Held<T, Columns> branch;
      branch.fetch(span, x_row);
      x.fetch(span, residual_row);
      span.each([&](int k, auto col) {
        float v[kWidth], sum[kWidth];
        branch.get(v, k);
        x.get(sum, k);
        drop_access<Columns>(v, norm.dropout, row, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += v[i];
        x.put(packed<R>(sum), k);
        span.write(sum_row, col, packed<R>(sum), norm.once && span.is_read_once());
      });
    } else {
      x.fetch(span, x_row);
    }
  };

  auto spread = Spread<kCentred>::nothing();
  span.pass(fetch, [&] { spread = merge(spread, spread_of<kCentred>(span, x)); });
  is_summed = true;
  spread = team.reduce(spread);
  float m = 0.f, squares;
  if constexpr (kCentred) {
    m = spread.mean;
    squares = spread.squares;
  } else {
    squares = spread.at[0];
  }
  const float r = rsqrtf(squares / norm.cols + norm.eps);
  if (there && team.index() == 0) {
    if (kCentred) norm.mean[row] = m;
    norm.rstd[row] = r;
  }

  span.pass(fetch, [&] {
    span.each([&](int k, auto col) {
      float v[kWidth];
      x.get(v, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = (v[i] - m) * r;
      weigh<T>(v, norm, span, col);
      span.write(y_row, col, packed<T>(v), norm.once);
    });
  });
}

}  // namespace

}  // namespace tilewise
