// Softmax: a row that its team can hold is read once.
#include "cuda/row_launch.cuh"

namespace tilewise {
namespace {

constexpr int kForwardHeld = 8;   // of x
constexpr int kBackwardHeld = 4;  // of y, and of dy

template <typename T>
struct SoftmaxForward {
  T* y;
  const T* x;
  int64_t rows, cols, x_stride;
  float scale;
  bool log;
  int blocks;  // of a row
  bool once;   // whether y is too long to stay in L2
};

// y = exp(t - m) / sum(exp(t - m)), or its logarithm, with t = scale * x and m = max(t).
template <typename T, int kHeld, bool kExact>
__global__ void __launch_bounds__(kHeld <= kFewHeld ? kNarrowThreads : kTeamThreads,
                                  kHeld <= kFewHeld ? kFewBlocks : 1)
    forward_kernel(SoftmaxForward<T> softmax) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Exponentials> team(softmax.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const T* x_row = softmax.x + row * softmax.x_stride;
  T* y_row = softmax.y + row * softmax.cols;
  Columns span(softmax.cols, kExact ? 0 : misaligned_by(y_row), team);
  span.begin(row < softmax.rows);

  Held<T, Columns> x;
  const auto fetch = [&] { x.fetch(span, x_row); };
  auto exponentials = Exponentials::nothing();
  span.pass(fetch, [&] {
    float top = -INFINITY, sum = 0.f, t[kWidth];
    span.each([&](int k, auto col) {
      x.get(t, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (span.has(col, i)) top = fmaxf(top, softmax.scale * t[i]);
      }
    });
    const float base = finite_top(top);
    span.each([&](int k, auto col) {
      x.get(t, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (span.has(col, i)) sum += exponential<T>(softmax.scale * t[i] - base);
      }
    });
    exponentials = merge(exponentials, {top, sum});
  });
  exponentials = team.reduce(exponentials);
  const float m = exponentials.top;
  const float sum = exponentials.sum;  // NaN where x has NaN or inf, 0 where it has only -inf

  span.pass(fetch, [&] {
    const float log_sum = logf(sum), rescale = 1.f / sum;
    span.each([&](int k, auto col) {
      float t[kWidth];
      x.get(t, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        t[i] = softmax.scale * t[i] - m;
        t[i] = softmax.log ? t[i] - log_sum : exponential<T>(t[i]) * rescale;
      }
      span.write(y_row, col, packed<T>(t), softmax.once);
    });
  });
}

template <typename T>
struct SoftmaxBackward {
  T* dx;
  const T *dy, *y;
  int64_t rows, cols, dy_stride, y_stride;
  float scale;
  bool log;
  int blocks;
  bool once;
};

// dx = scale * y * (dy - sum(dy * y)), or of the logarithm: scale * (dy - exp(y) * sum(dy)).
template <typename T, int kHeld, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1) backward_kernel(SoftmaxBackward<T> softmax) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Sums<1>> team(softmax.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const T *dy_row = softmax.dy + row * softmax.dy_stride,
          *y_row = softmax.y + row * softmax.y_stride;
  T* dx_row = softmax.dx + row * softmax.cols;
  Columns span(softmax.cols, kExact ? 0 : misaligned_by(dx_row), team);
  span.begin(row < softmax.rows);

  Held<T, Columns> dy, y;
  const auto fetch = [&] {
    dy.fetch(span, dy_row);
    y.fetch(span, y_row);
  };
  auto sums = Sums<1>::nothing();
  span.pass(fetch, [&] {
    span.each([&](int k, auto) {
      float g[kWidth], p[kWidth];
      dy.get(g, k);
      y.get(p, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums.at[0] += softmax.log ? g[i] : g[i] * p[i];
    });
  });
  const float dot = team.reduce(sums).at[0];

  span.pass(fetch, [&] {
    span.each([&](int k, auto col) {
      float g[kWidth], p[kWidth];
      dy.get(g, k);
      y.get(p, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        g[i] =
            softmax.scale * (softmax.log ? g[i] - exponential<T>(p[i]) * dot : p[i] * (g[i] - dot));
      }
      span.write(dx_row, col, packed<T>(g), softmax.once);
    });
  });
}

}  // namespace

cudaError_t softmax_forward(void* y, const void* x, int64_t rows, int64_t cols, int64_t x_stride,
                            float scale, bool log, DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(y, x), cols, x_stride);
    const Rows taken = rows_of<T>(rows, cols, kForwardHeld, wide);
    const SoftmaxForward<T> softmax{static_cast<T*>(y),
                                    static_cast<const T*>(x),
                                    rows,
                                    cols,
                                    x_stride,
                                    scale,
                                    log,
                                    taken.layout.blocks,
                                    taken.once};
    return for_held<kForwardHeld, true>(taken, [&](auto held, auto exact) {
      return launch_rows(forward_kernel<T, held.value, exact.value>, taken.layout, rows, 0, stream,
                         softmax);
    });
  });
}

cudaError_t softmax_backward(void* dx, const void* dy, const void* y, int64_t rows, int64_t cols,
                             int64_t dy_stride, int64_t y_stride, float scale, bool log,
                             DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool wide = can_vectorise<kVector<T>>(addresses(dx, dy, y), cols, dy_stride, y_stride);
    const Rows taken = rows_of<T>(rows, cols, kBackwardHeld, wide);
    const SoftmaxBackward<T> softmax{static_cast<T*>(dx),
                                     static_cast<const T*>(dy),
                                     static_cast<const T*>(y),
                                     rows,
                                     cols,
                                     dy_stride,
                                     y_stride,
                                     scale,
                                     log,
                                     taken.layout.blocks,
                                     taken.once};
    return for_held<kBackwardHeld, false>(taken, [&](auto held, auto exact) {
      return launch_rows(backward_kernel<T, held.value, exact.value>, taken.layout, rows, 0, stream,
                         softmax);
    });
  });
}

}  // namespace tilewise
