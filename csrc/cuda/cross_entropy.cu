// Cross-entropy: a row is read once for its loss, and once more, out of a cache, for its gradient.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace tilewise {
namespace {

// The numbers in the formula of the loss; a cap of 0 is none.
struct Numbers {
  int64_t ignore_index;
  float smoothing, z_loss, cap, scale;
  bool plain() const { return cap == 0.f && scale == 1.f; }
};

// Rows of logits, or of their gradients: two strides, for all tokens but the last of each sequence.
struct Place {
  int64_t seq, batch_stride, seq_stride;
  __device__ int64_t of(int64_t row) const {
    return row / seq * batch_stride + row % seq * seq_stride;
  }
};

// What is known of a row: its maximum, the sum of exp(s - maximum), and 1 - p of the true class,
// from the sum of the others, so that no digit cancels.
struct Known {
  float maximum, sum, miss;
};

struct Target {
  int64_t index;
  bool counted, valid;
  __device__ Target(int64_t index, int64_t classes, const Numbers& numbers)
      : index(index),
        counted(index != numbers.ignore_index),
        valid(index >= 0 && index < classes) {}
};

// Call body with a width and a column: 16 bytes at a time between two addresses that are aligned,
// one element at a time before and after, and everywhere if not `wide`.
template <typename T, typename Body>
__device__ void for_row(const T* row, int64_t cols, bool wide, Body body) {
  constexpr int kWidth = kVector<T>;
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % kAccessBytes);
  int64_t head = past ? (kAccessBytes - past) / int64_t{sizeof(T)} : 0;
  if (!wide || head > cols) head = cols;
  const int64_t tail = head + (cols - head) / kWidth * kWidth;
  for (int64_t col = threadIdx.x; col < head; col += blockDim.x) {
    body(std::integral_constant<int, 1>{}, col);
  }
#pragma unroll 1
  for (int64_t col = head + threadIdx.x * kWidth; col < tail; col += blockDim.x * kWidth) {
    body(std::integral_constant<int, kWidth>{}, col);
  }
  for (int64_t col = tail + threadIdx.x; col < cols; col += blockDim.x) {
    body(std::integral_constant<int, 1>{}, col);
  }
}

template <bool kPlain>
__device__ float score(float x, const Numbers& numbers) {
  if constexpr (kPlain) return x;
  const float s = x * numbers.scale;
  return numbers.cap > 0.f ? numbers.cap * tanhf(s / numbers.cap) : s;
}

// The derivative of a score, from itself.
template <bool kPlain>
__device__ float slope(float s, const Numbers& numbers) {
  if constexpr (kPlain) return 1.f;
  const float t = numbers.cap > 0.f ? s / numbers.cap : 0.f;
  return numbers.scale * (1.f - t * t);
}

// The loss of a row that counts and its lse; thread 0 has stored nothing yet.
template <bool kPlain, typename T>
__device__ Known row_loss(float& loss, float& lse, const T* x, int64_t classes,
                          const Target& target, const float* weights, const Numbers& numbers) {
  // Read before anything may be written where it lies.
  const float s_true = score<kPlain>(to_float(x[target.valid ? target.index : 0]), numbers);
  const bool smooth = numbers.smoothing > 0.f;
  float m = -INFINITY, others = 0.f, total = 0.f;
  for_row(x, classes, true, [&](auto width, int64_t col) {
    constexpr int kWidth = decltype(width)::value;
    float s[kWidth], top = -INFINITY;
    load(s, x + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      s[i] = score<kPlain>(s[i], numbers);
      top = fmaxf(top, s[i]);
    }
    if (top > m) {
      others *= expf(m - top);
      m = top;
    }
    const float shift = m == -INFINITY ? 0.f : m;  // exp(-inf - 0) is 0, not NaN
#pragma unroll
    for (int i = 0; i < kWidth; ++i) others += col + i == target.index ? 0.f : expf(s[i] - shift);
    if (smooth) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total += weights ? weights[col + i] * s[i] : s[i];
    }
  });
  const float maximum = row_maximum(m);
  float sums[] = {m == -INFINITY ? others : others * expf(m - maximum), total};
  row_reduce(sums, Sum{});

  const float power = target.valid ? expf(s_true - maximum) : 0.f;
  const float sum = sums[0] + power;
  lse = maximum + logf(sum);
  // log(sum / power): its digits are those of the others where these are few.
  const float nll = sums[0] < power ? log1pf(sums[0] / power) : maximum - s_true + logf(sum);
  const float weight = weights && target.valid ? weights[target.index] : 1.f;
  loss = (1.f - numbers.smoothing) * weight * nll + numbers.z_loss * lse * lse;
  if (smooth) {
    const float weight_sum = weights ? weights[classes] : static_cast<float>(classes);
    loss += numbers.smoothing / classes * (weight_sum * lse - sums[1]);
  }
  if (!target.valid) loss = NAN;
  return {maximum, sum, sums[0] / sum};
}

// The gradient of classes `first` and on, `cols` of them; dx may be x.
template <bool kPlain, typename T>
__device__ void row_gradient(T* dx, const T* x, int64_t first, int64_t cols, int64_t classes,
                             const Target& target, const Known& known, float dloss, float dlse,
                             const float* weights, const Numbers& numbers) {
  const bool wide = reinterpret_cast<uintptr_t>(dx) % kAccessBytes ==
                    reinterpret_cast<uintptr_t>(x) % kAccessBytes;
  if (!target.counted || !target.valid) {
    for_row(dx, cols, true, [&](auto width, int64_t col) {
      float filling[decltype(width)::value];
#pragma unroll
      for (float& value : filling) value = target.counted ? NAN : 0.f;
      store(dx + col, filling);
    });
    return;
  }
  const float weight = weights ? weights[target.index] : 1.f;
  const float weight_sum = weights ? weights[classes] : static_cast<float>(classes);
  const float lse = known.maximum + logf(known.sum);
  const float pull = dloss * numbers.smoothing / classes;
  const float main = dloss * (1.f - numbers.smoothing) * weight;
  const float rest = pull * weight_sum + 2.f * dloss * numbers.z_loss * lse + dlse;
  const float push = (main + rest) / known.sum;
  for_row(x, cols, wide, [&](auto width, int64_t col) {
    constexpr int kWidth = decltype(width)::value;
    float g[kWidth];
    load(g, x + col);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t j = first + col + i;
      const float s = score<kPlain>(g[i], numbers);
      const float power = expf(s - known.maximum);
      // The true class by itself: p - 1 has no digit left where p is nearly 1.
      g[i] = j == target.index ? rest / known.sum * power - main * known.miss : push * power;
      if (pull != 0.f) g[i] -= weights ? pull * weights[j] : pull;
      g[i] *= slope<kPlain>(s, numbers);
    }
    store(dx + col, g);
  });
}

template <bool kPlain, typename T>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    forward_kernel(float* losses, float* all_lse, float* statistics, const T* logits,
                   const int64_t* targets, const float* weights, int64_t rows, int64_t classes,
                   Place place, Numbers numbers) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const Target target(targets[row], classes, numbers);
    float loss = 0.f, lse = 0.f;
    Known known{0.f, 1.f, 0.f};
    if (target.counted) {
      known =
          row_loss<kPlain>(loss, lse, logits + place.of(row), classes, target, weights, numbers);
    }
    if (threadIdx.x == 0) {
      losses[row] = loss;
      all_lse[row] = lse;
      statistics[row] = known.maximum;
      statistics[rows + row] = known.sum;
      statistics[2 * rows + row] = known.miss;
    }
  }
}

template <bool kPlain, typename T>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    backward_kernel(T* dlogits, const float* dlosses, const float* dlse, const T* logits,
                    const int64_t* targets, const float* weights, const float* statistics,
                    int64_t rows, int64_t first, int64_t cols, int64_t classes, Place place,
                    Place d_place, Numbers numbers) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const Known known{statistics[row], statistics[rows + row], statistics[2 * rows + row]};
    row_gradient<kPlain>(dlogits + d_place.of(row), logits + place.of(row), first, cols, classes,
                         Target(targets[row], classes, numbers), known, dlosses[row],
                         dlse ? dlse[row] : 0.f, weights, numbers);
  }
}

template <bool kPlain, typename T>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    in_place_kernel(float* losses, float* all_lse, T* logits, const float* dlosses,
                    const int64_t* targets, const float* weights, int64_t rows, int64_t classes,
                    Place place, int64_t dloss_stride, Numbers numbers) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    T* x = logits + place.of(row);
    const Target target(targets[row], classes, numbers);
    float loss = 0.f, lse = 0.f;
    Known known{0.f, 1.f, 0.f};
    if (target.counted) {
      known = row_loss<kPlain>(loss, lse, x, classes, target, weights, numbers);
      __syncwarp();  // every lane has read the true class; sums by shuffles order no memory
    }
    if (threadIdx.x == 0) {
      losses[row] = loss;
      all_lse[row] = lse;
    }
    const float dloss = dlosses ? dlosses[row * dloss_stride] : 1.f;
    row_gradient<kPlain>(x, x, 0, classes, classes, target, known, dloss, 0.f, weights, numbers);
  }
}

}  // namespace

cudaError_t cross_entropy_forward(float* losses, float* lse, float* statistics, const void* logits,
                                  const int64_t* target, const float* weights, int64_t rows,
                                  int64_t seq, int64_t classes, int64_t batch_stride,
                                  int64_t seq_stride, int64_t ignore_index, float smoothing,
                                  float z_loss, float cap, float scale, DType dtype,
                                  cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Numbers numbers{ignore_index, smoothing, z_loss, cap, scale};
    const dim3 threads = threads_for(classes, kVector<T>);
    return launch(numbers.plain() ? forward_kernel<true, T> : forward_kernel<false, T>,
                  blocks_for(rows, threads), threads, 0, stream, losses, lse, statistics,
                  static_cast<const T*>(logits), target, weights, rows, classes,
                  Place{seq, batch_stride, seq_stride}, numbers);
  });
}

cudaError_t cross_entropy_backward(void* dlogits, const float* dlosses, const float* dlse,
                                   const void* logits, const int64_t* target, const float* weights,
                                   const float* statistics, int64_t rows, int64_t seq,
                                   int64_t first, int64_t cols, int64_t classes,
                                   int64_t batch_stride, int64_t seq_stride, int64_t d_batch_stride,
                                   int64_t d_seq_stride, int64_t ignore_index, float smoothing,
                                   float z_loss, float cap, float scale, DType dtype,
                                   cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Numbers numbers{ignore_index, smoothing, z_loss, cap, scale};
    const dim3 threads = threads_for(cols, kVector<T>);
    return launch(numbers.plain() ? backward_kernel<true, T> : backward_kernel<false, T>,
                  blocks_for(rows, threads), threads, 0, stream, static_cast<T*>(dlogits), dlosses,
                  dlse, static_cast<const T*>(logits), target, weights, statistics, rows, first,
                  cols, classes, Place{seq, batch_stride, seq_stride},
                  Place{seq, d_batch_stride, d_seq_stride}, numbers);
  });
}

cudaError_t cross_entropy_in_place(float* losses, float* lse, void* logits, const float* dlosses,
                                   const int64_t* target, const float* weights, int64_t rows,
                                   int64_t seq, int64_t classes, int64_t batch_stride,
                                   int64_t seq_stride, int64_t dloss_stride, int64_t ignore_index,
                                   float smoothing, float z_loss, float cap, float scale,
                                   DType dtype, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Numbers numbers{ignore_index, smoothing, z_loss, cap, scale};
    const dim3 threads = threads_for(classes, kVector<T>);
    return launch(numbers.plain() ? in_place_kernel<true, T> : in_place_kernel<false, T>,
                  blocks_for(rows, threads), threads, 0, stream, losses, lse,
                  static_cast<T*>(logits), dlosses, target, weights, rows, classes,
                  Place{seq, batch_stride, seq_stride}, dloss_stride, numbers);
  });
}

}  // namespace tilewise
