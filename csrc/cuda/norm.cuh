// RMSNorm and LayerNorm, forward: what differs is whether the mean is taken off.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/span.cuh"

namespace tilewise {

// A weight or a bias, [cols]: like x, in fp32, or missing.
struct Parameter {
  const void* at;
  bool is_single;
};

// What T x and a parameter have at a column; `otherwise` where it is missing.
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

template <typename T>
struct NormForward {
  T* y;
  float *mean, *rstd;  // no mean unless it is taken off
  const T* x;
  Parameter weight, bias;
  int64_t rows, cols, x_stride;
  float eps;
  int blocks;  // of a row
  bool once;   // whether y is too long to stay in L2
};

template <bool kCentred, typename T, int kHeld, bool kExact>
__global__ void __launch_bounds__(most_threads(kHeld), least_blocks(kHeld))
    norm_forward_kernel(NormForward<T> norm) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Spread<kCentred>> team(norm.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < norm.rows;
  const T* x_row = norm.x + row * norm.x_stride;
  T* y_row = norm.y + row * norm.cols;
  Columns span(norm.cols, kExact ? 0 : misaligned_by(y_row), team);
  span.begin(there);

  Held<T, Columns> x;
  const auto fetch = [&] { x.fetch(span, x_row); };
  auto spread = Spread<kCentred>::nothing();
  span.pass(fetch, [&] { spread = merge(spread, spread_of<kCentred>(span, x)); });
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
      float v[kWidth], w[kWidth], b[kWidth];
      x.get(v, k);
      load_parameter<T>(w, norm.weight, span, col, 1.f);
      load_parameter<T>(b, norm.bias, span, col, 0.f);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = (v[i] - m) * r * w[i] + b[i];
      span.write(y_row, col, packed<T>(v), norm.once);
    });
  });
}

}  // namespace tilewise
