// Softmax of scores with a cap, a bias, a mask or a causal limit: as softmax.cu, but the scores are
// held, in fp32, and what is not seen is not read.
#include "cuda/row_launch.cuh"
#include "cuda/scores.cuh"

namespace tilewise {
namespace {

constexpr int kForwardHeld = 4;   // of the scores
constexpr int kBackwardHeld = 4;  // of y, and of dy
constexpr int kDbiasThreads = 128;

template <typename T, typename B>
struct Forward {
  T* y;
  const T* x;
  const B* bias;
  Strides bias_strides;
  Hiding hiding;
  int64_t rows, cols, x_stride;
  float scale, softcap;
  bool zero, log;
  int blocks;  // of a row
  bool once;   // whether y is too long to stay in L2
};

template <typename T, typename B, int kHeld, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1) forward_kernel(Forward<T, B> softmax) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Exponentials> team(softmax.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < softmax.rows;
  const Position position(there ? row : 0, softmax.hiding.heads, softmax.hiding.queries);
  const Shown shown(softmax.hiding, position, softmax.cols);
  const T* x_row = softmax.x + row * softmax.x_stride;
  const B* bias_row = softmax.bias ? softmax.bias + position.start(softmax.bias_strides) : nullptr;
  T* y_row = softmax.y + row * softmax.cols;
  Columns span(softmax.cols, kExact ? 0 : misaligned_by(y_row), team);
  span.begin(there);

  float s[kHeld][kWidth];
  const auto fetch = [&] {
    span.each([&](int k, auto col) {
      const uint32_t bits = shown.template bits<kWidth>(col, softmax.cols, kExact);
      float x[kWidth] = {}, b[kWidth] = {};
      if (bits) {
        unpack(x, span.read(x_row, col, span.is_read_once()));
        if (bias_row && softmax.bias_strides.col) unpack(b, span.read(bias_row, col, false));
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float score = softmax.scale * x[i];
        if (softmax.softcap > 0.f) score = capped(score, softmax.softcap);
        score += bias_row && !softmax.bias_strides.col ? to_float(*bias_row) : b[i];
        s[k][i] = bits >> i & 1 && span.has(col, i) ? score : -INFINITY;
      }
    });
  };
  auto exponentials = Exponentials::nothing();
  span.pass(fetch, [&] {
    float top = -INFINITY, sum = 0.f;
    span.each([&](int k, auto) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) top = fmaxf(top, s[k][i]);
    });
    const float base = finite_top(top);
    span.each([&](int k, auto) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += expf(s[k][i] - base);
    });
    exponentials = merge(exponentials, {top, sum});
  });
  exponentials = team.reduce(exponentials);
  const float m = exponentials.top;
  const bool nothing = softmax.zero && m == -INFINITY && exponentials.sum == 0.f;

  span.pass(fetch, [&] {
    const float log_sum = logf(exponentials.sum), rescale = 1.f / exponentials.sum;
    span.each([&](int k, auto col) {
      float t[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        t[i] = s[k][i] - m;
        t[i] = softmax.log ? t[i] - log_sum : expf(t[i]) * rescale;
        if (nothing) t[i] = softmax.log ? -INFINITY : 0.f;
      }
      span.write(y_row, col, packed<T>(t), softmax.once);
    });
  });
}

template <typename T>
struct Backward {
  T* dx;
  float* totals;  // of each row what its gradients have in common, and
  int* seen;      // how many columns have one: for that of the bias, else null
  const T *dy, *y, *x;
  Hiding hiding;
  int64_t rows, cols, dy_stride, y_stride, x_stride;
  float scale, softcap;
  bool zero, log;
  int blocks;
  bool once;
};

// The gradient of a score: y * (dy - sum(dy * y)), or of the logarithm: dy - exp(y) * sum(dy).
__device__ float dscore(float dy, float y, float total, bool log) {
  return log ? dy - expf(y) * total : y * (dy - total);
}

template <typename T, int kHeld, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1) backward_kernel(Backward<T> softmax) {
  using Columns = Span<kVector<T>, kHeld, kExact>;
  constexpr int kWidth = Columns::kWidth;
  Team<Sums<2>> team(softmax.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < softmax.rows;
  const Position position(there ? row : 0, softmax.hiding.heads, softmax.hiding.queries);
  const Shown shown(softmax.hiding, position, softmax.cols);
  const T *dy_row = softmax.dy + row * softmax.dy_stride,
          *y_row = softmax.y + row * softmax.y_stride, *x_row = softmax.x + row * softmax.x_stride;
  T* dx_row = softmax.dx + row * softmax.cols;
  Columns span(softmax.cols, kExact ? 0 : misaligned_by(dx_row), team);
  span.begin(there);

  Held<T, Columns> dy, y;
  const auto fetch = [&] {
    dy.fetch(span, dy_row);
    y.fetch(span, y_row);
  };
  auto sums = Sums<2>::nothing();  // the second: how many logarithms are not -inf
  span.pass(fetch, [&] {
    span.each([&](int k, auto col) {
      float g[kWidth], p[kWidth];
      dy.get(g, k);
      y.get(p, k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sums.at[0] += softmax.log ? g[i] : g[i] * p[i];
        if (span.has(col, i) && p[i] != -INFINITY) sums.at[1] += 1.f;
      }
    });
  });
  sums = team.reduce(sums);
  const float total = sums.at[0];
  const bool dead = softmax.log && softmax.zero && sums.at[1] == 0.f;
  if (softmax.totals && there && team.index() == 0) {
    softmax.totals[row] = total;
    softmax.seen[row] = dead ? 0 : static_cast<int>(shown.seen());
  }

  span.pass(fetch, [&] {
    span.each([&](int k, auto col) {
      const uint32_t bits = dead ? 0 : shown.template bits<kWidth>(col, softmax.cols, kExact);
      float g[kWidth], p[kWidth], s[kWidth] = {};
      dy.get(g, k);
      y.get(p, k);
      if (softmax.softcap > 0.f && bits) unpack(s, span.read(x_row, col, true));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        g[i] = softmax.scale * dscore(g[i], p[i], total, softmax.log);
        if (softmax.softcap > 0.f) g[i] *= capped_slope(softmax.scale * s[i], softmax.softcap);
        if (!(bits >> i & 1)) g[i] = 0.f;
      }
      span.write(dx_row, col, packed<T>(g), softmax.once);
    });
  });
}

template <typename T>
struct Dbias {
  float* sums;  // [lines * parts, cols]
  const T *dy, *y;
  const float* totals;
  const int* seen;
  Hiding hiding;
  int64_t cols, dy_stride, y_stride, copies, parts;
  int bias_heads, bias_queries;
  int chunks;  // of kDbiasThreads accesses, in a line
  bool log;
};

// A line of the bias was added to `copies` rows: all batches, heads and queries where its own size
// is 1. A block adds up one of `parts` parts of them, a thread kWidth columns.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kDbiasThreads) dbias_kernel(Dbias<T> bias) {
  const int64_t piece = blockIdx.x / bias.chunks;
  const int64_t col = (int64_t{blockIdx.x % bias.chunks} * blockDim.x + threadIdx.x) * kWidth;
  if (col >= bias.cols) return;
  const int64_t line = piece / bias.parts, part = piece % bias.parts;
  const int heads = bias.hiding.heads, queries = bias.hiding.queries;
  const int head_copies = bias.bias_heads == 1 ? heads : 1;
  const int query_copies = bias.bias_queries == 1 ? queries : 1;
  const int64_t first_query = line % bias.bias_queries;
  const int64_t first_head = line / bias.bias_queries % bias.bias_heads;
  const int64_t first_batch = line / bias.bias_queries / bias.bias_heads;

  float sum[kWidth] = {};
  const int64_t end = (part + 1) * bias.copies / bias.parts;
  for (int64_t i = part * bias.copies / bias.parts; i < end; ++i) {
    const int64_t query = first_query + i % query_copies;
    const int64_t head = first_head + i / query_copies % head_copies;
    const int64_t batch = first_batch + i / query_copies / head_copies;
    const int64_t row = (batch * heads + head) * queries + query;
    if (col >= bias.seen[row]) continue;
    const Shown shown(bias.hiding, Position(row, heads, queries), bias.cols);
    const uint32_t bits = shown.bits<kWidth>(col, bias.cols, kWidth > 1);
    const float total = bias.totals[row];
    float g[kWidth], p[kWidth];
    load(g, bias.dy + row * bias.dy_stride + col);
    load(p, bias.y + row * bias.y_stride + col);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (bits >> k & 1) sum[k] += dscore(g[k], p[k], total, bias.log);
    }
  }
  store(bias.sums + piece * bias.cols + col, sum);
}

// What all arrays must be for accesses of kVector<T>: the mask is read as many bytes at a time.
template <typename T>
bool is_wide(const Hiding& hiding) {
  const Strides& strides = hiding.strides;
  return !hiding.mask || !strides.col ||
         can_vectorise<kVector<T>>(addresses(hiding.mask), strides.batch, strides.head,
                                   strides.query);
}

}  // namespace

cudaError_t scored_softmax_forward(void* y, const void* x, const void* bias, const uint8_t* mask,
                                   int64_t rows, int64_t cols, int64_t heads, int64_t queries,
                                   int64_t x_stride, int64_t bias_batch, int64_t bias_head,
                                   int64_t bias_query, int64_t bias_col, int64_t mask_batch,
                                   int64_t mask_head, int64_t mask_query, int64_t mask_col,
                                   float scale, float softcap, bool causal, bool zero, bool log,
                                   DType dtype, DType bias_dtype, cudaStream_t stream) {
  if (rows > UINT32_MAX || heads > INT32_MAX || queries > INT32_MAX) return cudaErrorInvalidValue;
  return for_dtypes(dtype, bias_dtype, [&](auto t, auto b) {
    using T = typename decltype(t)::type;
    using B = typename decltype(b)::type;
    const Hiding hiding{mask,
                        {mask_batch, mask_head, mask_query, mask_col},
                        static_cast<int>(heads),
                        static_cast<int>(queries),
                        causal};
    const bool wide =
        can_vectorise<kVector<T>>(addresses(y, x), cols, x_stride) && is_wide<T>(hiding) &&
        (!bias_col ||
         can_vectorise<kVector<T>>(addresses(bias), bias_batch, bias_head, bias_query));
    const Rows taken = rows_of<T>(rows, cols, kForwardHeld, wide);
    Forward<T, B> softmax{};
    softmax.y = static_cast<T*>(y);
    softmax.x = static_cast<const T*>(x);
    softmax.bias = static_cast<const B*>(bias);
    softmax.bias_strides = {bias_batch, bias_head, bias_query, bias_col};
    softmax.hiding = hiding;
    softmax.rows = rows;
    softmax.cols = cols;
    softmax.x_stride = x_stride;
    softmax.scale = scale;
    softmax.softcap = softcap;
    softmax.zero = zero;
    softmax.log = log;
    softmax.blocks = taken.layout.blocks;
    softmax.once = taken.once;
    return for_held<kForwardHeld, false>(taken, [&](auto held, auto exact) {
      return launch_rows(forward_kernel<T, B, held.value, exact.value>, taken.layout, rows, 0,
                         stream, softmax);
    });
  });
}

cudaError_t scored_softmax_backward(void* dx, float* totals, int* seen, const void* dy,
                                    const void* y, const void* x, const uint8_t* mask, int64_t rows,
                                    int64_t cols, int64_t heads, int64_t queries, int64_t dy_stride,
                                    int64_t y_stride, int64_t x_stride, int64_t mask_batch,
                                    int64_t mask_head, int64_t mask_query, int64_t mask_col,
                                    float scale, float softcap, bool causal, bool zero, bool log,
                                    DType dtype, cudaStream_t stream) {
  if (rows > UINT32_MAX || heads > INT32_MAX || queries > INT32_MAX) return cudaErrorInvalidValue;
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Hiding hiding{mask,
                        {mask_batch, mask_head, mask_query, mask_col},
                        static_cast<int>(heads),
                        static_cast<int>(queries),
                        causal};
    const bool wide =
        can_vectorise<kVector<T>>(addresses(dx, dy, y, x), cols, dy_stride, y_stride, x_stride) &&
        is_wide<T>(hiding);
    const Rows taken = rows_of<T>(rows, cols, kBackwardHeld, wide);
    Backward<T> softmax{};
    softmax.dx = static_cast<T*>(dx);
    softmax.totals = totals;
    softmax.seen = seen;
    softmax.dy = static_cast<const T*>(dy);
    softmax.y = static_cast<const T*>(y);
    softmax.x = static_cast<const T*>(x);
    softmax.hiding = hiding;
    softmax.rows = rows;
    softmax.cols = cols;
    softmax.dy_stride = dy_stride;
    softmax.y_stride = y_stride;
    softmax.x_stride = x_stride;
    softmax.scale = scale;
    softmax.softcap = softcap;
    softmax.zero = zero;
    softmax.log = log;
    softmax.blocks = taken.layout.blocks;
    softmax.once = taken.once;
    return for_held<kBackwardHeld, false>(taken, [&](auto held, auto exact) {
      return launch_rows(backward_kernel<T, held.value, exact.value>, taken.layout, rows, 0, stream,
                         softmax);
    });
  });
}

cudaError_t scored_softmax_dbias(float* sums, const void* dy, const void* y, const float* totals,
                                 const int* seen, const uint8_t* mask, int64_t lines, int64_t cols,
                                 int64_t heads, int64_t queries, int64_t bias_heads,
                                 int64_t bias_queries, int64_t copies, int64_t parts,
                                 int64_t dy_stride, int64_t y_stride, int64_t mask_batch,
                                 int64_t mask_head, int64_t mask_query, int64_t mask_col,
                                 bool causal, bool log, DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Dbias<T> bias{};
    bias.sums = sums;
    bias.dy = static_cast<const T*>(dy);
    bias.y = static_cast<const T*>(y);
    bias.totals = totals;
    bias.seen = seen;
    bias.hiding = {mask,
                   {mask_batch, mask_head, mask_query, mask_col},
                   static_cast<int>(heads),
                   static_cast<int>(queries),
                   causal};
    bias.cols = cols;
    bias.dy_stride = dy_stride;
    bias.y_stride = y_stride;
    bias.copies = copies;
    bias.parts = parts;
    bias.bias_heads = static_cast<int>(bias_heads);
    bias.bias_queries = static_cast<int>(bias_queries);
    bias.log = log;
    const bool wide =
        can_vectorise<kVector<T>>(addresses(sums, dy, y), cols, dy_stride, y_stride) &&
        is_wide<T>(bias.hiding);
    const int width = wide ? kVector<T> : 1;
    bias.chunks = static_cast<int>(ceil_divided(cols, int64_t{kDbiasThreads} * width));
    const int64_t blocks = lines * parts * bias.chunks;
    if (blocks > INT32_MAX || lines == 0) return cudaErrorInvalidConfiguration;
    const auto kernel = wide ? dbias_kernel<T, kVector<T>> : dbias_kernel<T, 1>;
    return launch(kernel, blocks, dim3(kDbiasThreads), 0, stream, bias);
  });
}

}  // namespace tilewise
