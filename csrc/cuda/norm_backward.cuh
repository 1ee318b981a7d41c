// RMSNorm and LayerNorm, backward. With g = dy * weight and xhat = (x - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// without mean(g) where no mean is taken off; dweight = sum(dy * xhat), dbias = sum(dy).
#pragma once

#include "cuda/norm.cuh"
#include "cuda/parts.cuh"

namespace tilewise {

template <typename T>
struct NormBackward {
  T* dx;                             // any of these may be nullptr: not wanted
  float *weight_parts, *bias_parts;  // [parts, cols]
  const T *dy, *x;
  Parameter weight;
  const float *mean, *rstd;
  int64_t rows, cols, dy_stride, x_stride;
  int64_t parts;
  int blocks;      // of a row
  bool in_shared;  // whether the sums of columns fit there
  bool steady;     // whether all rows of a part are aligned alike
  bool once;
};

// A block, or a cluster, has a part of the rows: every parts-th, its teams in turn.
template <bool kCentred, typename T, int kHeld, bool kExact>
__global__ void __launch_bounds__(kTeamThreads) norm_backward_kernel(NormBackward<T> norm) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Sums<kCentred ? 2 : 1>> team(norm.blocks);
  const int64_t part = team.number();
  const bool is_shifted = !kExact && norm.steady;
  Columns span(norm.cols, is_shifted ? misaligned_by(norm.dx + part * norm.cols) : 0, team);
  ColumnSums<Columns> dweight(norm.weight_parts ? norm.weight_parts + part * norm.cols : nullptr,
                              norm.in_shared, 0, span);
  ColumnSums<Columns> dbias(norm.bias_parts ? norm.bias_parts + part * norm.cols : nullptr,
                            norm.in_shared, norm.weight_parts ? 1 : 0, span);
  dweight.clear(span);
  dbias.clear(span);

  Held<T, Columns> dy, x;
  const auto step = norm.parts * blockDim.y;
  for (int64_t first = part; first < norm.rows; first += step) {
    const int64_t row = first + norm.parts * threadIdx.y;
    const bool there = row < norm.rows;
    span.begin(there);
    const T *dy_row = norm.dy + row * norm.dy_stride, *x_row = norm.x + row * norm.x_stride;
    const float m = kCentred && there ? norm.mean[row] : 0.f, r = there ? norm.rstd[row] : 0.f;
    const auto fetch = [&] {
      dy.fetch(span, dy_row);
      x.fetch(span, x_row);
    };

    float mean_g = 0.f, mean_gxhat = 0.f;
    if (norm.dx) {
      auto sums = Sums < kCentred ? 2 : 1 > ::nothing();
      span.pass(fetch, [&] {
        span.each([&](int k, auto col) {
          float g[kWidth], v[kWidth], w[kWidth];
          dy.get(g, k);
          x.get(v, k);
          load_parameter<T>(w, norm.weight, span, col, 1.f);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            g[i] *= w[i];
            sums.at[0] += g[i] * ((v[i] - m) * r);
            if constexpr (kCentred) sums.at[1] += g[i];
          }
        });
      });
      sums = team.reduce(sums);
      mean_gxhat = sums.at[0] / norm.cols;
      if constexpr (kCentred) mean_g = sums.at[1] / norm.cols;
    }

    span.pass(fetch, [&] {
      span.each([&](int k, auto col) {
        float g[kWidth], xhat[kWidth], w[kWidth];
        dy.get(g, k);
        x.get(xhat, k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) xhat[i] = (xhat[i] - m) * r;
        if (norm.dx) {
          load_parameter<T>(w, norm.weight, span, col, 1.f);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            w[i] = r * (g[i] * w[i] - mean_g - xhat[i] * mean_gxhat);
          }
          span.write(norm.dx + row * norm.cols, col, packed<T>(w), norm.once);
        }
        if (dbias.wanted()) dbias.add(span, k, col, g);
        if (dweight.wanted()) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) xhat[i] *= g[i];
          dweight.add(span, k, col, xhat);
        }
      });
    });
  }

  team.leave();
  if (blockDim.y > 1) __syncthreads();
  span.begin(true);
  dweight.finish(span);
  dbias.finish(span);
}

}  // namespace tilewise
