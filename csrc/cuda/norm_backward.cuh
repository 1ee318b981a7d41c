// RMSNorm and LayerNorm, backward. With g = dy * (weight_offset + weight) and
// xhat = (x - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// without mean(g) where no mean is taken off; dweight = sum(dy * xhat), dbias = sum(dy). After an
// addition x is the sum, whose own gradient is added; it is the residual's too, and dropped out of,
// the branch's.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/parts.cuh"

namespace tilewise {

struct NormBackward {
  void *dx, *dresidual;              // T, R; these and the parts may be nullptr: not wanted
  float *weight_parts, *bias_parts;  // [parts, cols]
  const void *dy, *dsum, *x;         // T, R, R; no dsum if only what is normalised was used
  Parameter weight;
  const float *mean, *rstd;
  Places places;  // of the rows of x
  int64_t rows, cols, dy_stride, dsum_stride, parts;
  float weight_offset;
  Dropout dropout;
  int blocks;      // of a row; this and what follows is the launch's to say
  bool in_shared;  // whether the sums of columns fit there
  bool is_steady;  // whether all rows of a part are aligned alike
  bool once;       // whether what is written is too long to stay in L2
};

namespace {

// A block, or a cluster, has a part of the rows: every parts-th, its teams in turn.
template <bool kCentred, bool kAdds, typename T, typename R, int kHeld, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1) norm_backward_kernel(NormBackward norm) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  using Products = Sums<kCentred ? 2 : 1>;  // of g * xhat, of g
  constexpr int kWidth = Columns::kWidth;
  Team<Products> team(norm.blocks);
  const int64_t part = team.number();
  T* dx = static_cast<T*>(norm.dx);
  R* dresidual = static_cast<R*>(norm.dresidual);
  const bool wants_rows = dx || (kAdds && dresidual);
  int head = 0;
  if (!kExact && norm.is_steady) {
    head = dx ? misaligned_by(dx + part * norm.cols) : misaligned_by(dresidual + part * norm.cols);
  }
  Columns span(norm.cols, head, team);
  const auto part_of = [&](float* parts) { return parts ? parts + part * norm.cols : nullptr; };
  ColumnSums<Columns> dweight(part_of(norm.weight_parts), norm.in_shared, 0, span);
  ColumnSums<Columns> dbias(part_of(norm.bias_parts), norm.in_shared, norm.weight_parts ? 1 : 0,
                            span);
  dweight.clear(span);
  dbias.clear(span);

  Held<T, Columns> dy;
  Held<R, Columns> x, dsum;
  const int64_t step = norm.parts * blockDim.y;
  for (int64_t first = part; first < norm.rows; first += step) {
    const int64_t row = first + norm.parts * threadIdx.y;
    const bool there = row < norm.rows;
    span.begin(there);
    const T* dy_row = static_cast<const T*>(norm.dy) + row * norm.dy_stride;
    const R* x_row = static_cast<const R*>(norm.x) + (there ? norm.places.of(row) : 0);
    const float m = kCentred && there ? norm.mean[row] : 0.f, r = there ? norm.rstd[row] : 0.f;
    const auto fetch = [&] {
      dy.fetch(span, dy_row);
      x.fetch(span, x_row);
      if (kAdds && norm.dsum) {
        dsum.fetch(span, static_cast<const R*>(norm.dsum) + row * norm.dsum_stride);
      }
    };
    const auto weighted = [&](float (&g)[kWidth], typename Columns::Column col) {
      float w[kWidth];
      load_parameter<T>(w, norm.weight, span, col, 1.f);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] *= norm.weight_offset + w[i];
    };

    auto products = Products::nothing();
    if (wants_rows) {
      span.pass(fetch, [&] {
        span.each([&](int k, auto col) {
          float g[kWidth], v[kWidth];
          dy.get(g, k);
          x.get(v, k);
          weighted(g, col);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            products.at[0] += g[i] * ((v[i] - m) * r);
            if constexpr (kCentred) products.at[1] += g[i];
          }
        });
      });
      products = team.reduce(products);
    }
    const float mean_gxhat = products.at[0] / norm.cols;
    const float mean_g = kCentred ? products.at[Products::kLast] / norm.cols : 0.f;

    span.pass(fetch, [&] {
      span.each([&](int k, auto col) {
        float g[kWidth], xhat[kWidth];
        dy.get(g, k);
        x.get(xhat, k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) xhat[i] = (xhat[i] - m) * r;
        if (dbias.wanted()) dbias.add(span, k, col, g);
        if (dweight.wanted()) {
          float product[kWidth];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) product[i] = g[i] * xhat[i];
          dweight.add(span, k, col, product);
        }
        if (!wants_rows) return;
        weighted(g, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) g[i] = r * (g[i] - mean_g - xhat[i] * mean_gxhat);
        if constexpr (kAdds) {
          if (norm.dsum) {
            dsum.get(xhat, k);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) g[i] += xhat[i];
          }
          if (dresidual) {
            span.write(dresidual + row * norm.cols, col, packed<R>(g), norm.once);
          }
          drop_access<Columns>(g, norm.dropout, row, col);
        }
        if (dx) span.write(dx + row * norm.cols, col, packed<T>(g), norm.once);
      });
    });
  }

  team.leave();
  if (blockDim.y > 1) __syncthreads();
  span.begin(true);
  dweight.finish(span);
  dbias.finish(span);
}

}  // namespace

}  // namespace tilewise
