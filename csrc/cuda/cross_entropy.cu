// Cross-entropy: a row that its team can hold is read once, for its loss and for its gradient.
#include "cuda/row_launch.cuh"

namespace tilewise {
namespace {

constexpr int kLogitsHeld = 8;

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

// What is found in parts of a row: the maximum of the scores, the sum of exp(score - maximum) over
// all but the true class, and the weighted sum of the scores.
struct Found {
  float top, others, total;

  __device__ static Found nothing() { return {-INFINITY, 0.f, 0.f}; }
};

__device__ inline Found merge(Found a, Found b) {
  const Exponentials all = merge(Exponentials{a.top, a.others}, Exponentials{b.top, b.others});
  return {all.top, all.sum, a.total + b.total};
}

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

// Which element of the access at a column is the class, if any.
template <int kWidth>
__device__ int element_of(int64_t index, int64_t col) {
  const int64_t element = index - col;
  return element >= 0 && element < kWidth ? static_cast<int>(element) : -1;
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

// What is to be found in the accesses that are held.
template <bool kPlain, typename T, typename Columns>
__device__ Found find(const Held<T, Columns>& x, const Columns& span, const Target& target,
                      const float* weights, const Numbers& numbers) {
  constexpr int kWidth = Columns::kWidth;
  Found found = Found::nothing();
  float s[kWidth];
  span.each([&](int k, auto col) {
    x.get(s, k);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (span.has(col, i)) found.top = fmaxf(found.top, score<kPlain>(s[i], numbers));
    }
  });
  const float base = finite_top(found.top);
  span.each([&](int k, auto col) {
    const int hit = element_of<kWidth>(target.index, col);
    x.get(s, k);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float power = exponential<T>(score<kPlain>(s[i], numbers) - base);
      if (span.has(col, i) && i != hit) found.others += power;
    }
    if (numbers.smoothing > 0.f) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!span.has(col, i)) continue;
        found.total += score<kPlain>(s[i], numbers) * (weights ? weights[col + i] : 1.f);
      }
    }
  });
  return found;
}

// The loss of a row that counts, of which s_true is the score of the true class; and its lse.
__device__ inline Known row_loss(float& loss, float& lse, const Found& found, float s_true,
                                 int64_t classes, const Target& target, const float* weights,
                                 const Numbers& numbers) {
  const float power = target.valid ? expf(s_true - found.top) : 0.f;
  const float sum = found.others + power;
  lse = found.top + logf(sum);
  // log(sum / power): its digits are those of the others where these are few.
  const float nll =
      found.others < power ? log1pf(found.others / power) : found.top - s_true + logf(sum);
  const float weight = weights && target.valid ? weights[target.index] : 1.f;
  loss = (1.f - numbers.smoothing) * weight * nll + numbers.z_loss * lse * lse;
  if (numbers.smoothing > 0.f) {
    const float weight_sum = weights ? weights[classes] : static_cast<float>(classes);
    loss += numbers.smoothing / classes * (weight_sum * lse - found.total);
  }
  if (!target.valid) loss = NAN;
  return {found.top, sum, found.others / sum};
}

// The gradient of a row, of its classes from `first` on: 0 if it does not count, NaN if there is no
// such class, and then what is held is not looked at.
template <bool kPlain, typename T>
struct Gradient {
  int64_t index, first;
  float fill;  // of a row that is not computed
  bool computed;
  float maximum, main, rest, push, pull, miss, share;
  const float* weights;

  __device__ Gradient(int64_t first, int64_t classes, const Target& target, const Known& known,
                      float dloss, float dlse, const float* weights, const Numbers& numbers)
      : index(target.index),
        first(first),
        fill(target.counted ? NAN : 0.f),
        computed(target.counted && target.valid),
        maximum(known.maximum),
        miss(known.miss),
        weights(weights) {
    const float weight = weights && target.valid ? weights[target.index] : 1.f;
    const float weight_sum = weights ? weights[classes] : static_cast<float>(classes);
    const float lse = known.maximum + logf(known.sum);
    pull = dloss * numbers.smoothing / classes;
    main = dloss * (1.f - numbers.smoothing) * weight;
    rest = pull * weight_sum + 2.f * dloss * numbers.z_loss * lse + dlse;
    push = (main + rest) / known.sum;
    share = rest / known.sum;
  }

  template <typename Columns>
  __device__ void write(T* dx, const Held<T, Columns>& x, const Columns& span,
                        const Numbers& numbers, bool once) const {
    constexpr int kWidth = Columns::kWidth;
    span.each([&](int k, auto col) {
      float g[kWidth];
      if (computed) {
        const int hit = element_of<kWidth>(index, first + col);
        x.get(g, k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float s = score<kPlain>(g[i], numbers), power = exponential<T>(s - maximum);
          // The true class by itself: p - 1 has no digit left where p is nearly 1.
          g[i] = i == hit ? share * power - main * miss : push * power;
          if (pull != 0.f) {
            g[i] -= weights && span.has(col, i) ? pull * weights[first + col + i] : pull;
          }
          g[i] *= slope<kPlain>(s, numbers);
        }
      } else {
#pragma unroll
        for (float& value : g) value = fill;
      }
      span.write(dx, col, packed<T>(g), once);
    });
  }
};

template <typename T>
struct Rowwise {
  const T* logits;
  const int64_t* targets;
  const float* weights;  // [classes + 1], the last their sum; null: all 1
  int64_t rows, cols, classes;
  Place place;
  Numbers numbers;
  int blocks;  // of a row; this and what follows is the launch's to say
  bool once;   // whether what is written is too long to stay in L2
};

template <bool kPlain, typename T, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1)
    forward_kernel(Rowwise<T> given, float* losses, float* all_lse, float* statistics) {
  using Columns = Span<kVector<T>, kLogitsHeld, kExact>;
  Team<Found> team(given.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < given.rows;
  const Target target(there ? given.targets[row] : given.numbers.ignore_index, given.classes,
                      given.numbers);
  const T* x_row = given.logits + (there ? given.place.of(row) : 0);
  Columns span(given.classes, kExact ? 0 : misaligned_by(x_row), team);
  span.begin(there && target.counted);
  float s_true = 0.f;
  if (target.counted && target.valid) {
    s_true = score<kPlain>(to_float(x_row[target.index]), given.numbers);
  }

  Held<T, Columns> x;
  Found found = Found::nothing();
  span.pass(
      [&] { x.fetch(span, x_row); },
      [&] { found = merge(found, find<kPlain>(x, span, target, given.weights, given.numbers)); });
  found = team.reduce(found);

  if (there && team.index() == 0) {
    float loss = 0.f, lse = 0.f;
    Known known{0.f, 1.f, 0.f};
    if (target.counted) {
      known =
          row_loss(loss, lse, found, s_true, given.classes, target, given.weights, given.numbers);
    }
    losses[row] = loss;
    all_lse[row] = lse;
    statistics[row] = known.maximum;
    statistics[given.rows + row] = known.sum;
    statistics[2 * given.rows + row] = known.miss;
  }
}

template <bool kPlain, typename T, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1)
    backward_kernel(Rowwise<T> given, T* dlogits, const float* dlosses, const float* dlse,
                    const float* statistics, int64_t first, Place d_place) {
  using Columns = Span<kVector<T>, kLogitsHeld, kExact>;
  Team<Sums<1>> team(given.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  if (row < given.rows) {
    const Target target(given.targets[row], given.classes, given.numbers);
    const Known known{statistics[row], statistics[given.rows + row],
                      statistics[2 * given.rows + row]};
    const Gradient<kPlain, T> gradient(first, given.classes, target, known, dlosses[row],
                                       dlse ? dlse[row] : 0.f, given.weights, given.numbers);
    const T* x_row = given.logits + given.place.of(row);
    T* dx_row = dlogits + d_place.of(row);
    Columns span(given.cols, kExact ? 0 : misaligned_by(dx_row), team);
    span.begin(true);
    Held<T, Columns> x;
    span.pass(
        [&] {
          if (gradient.computed) x.fetch(span, x_row);
        },
        [&] { gradient.write(dx_row, x, span, given.numbers, given.once); });
  }
  team.leave();
}

template <bool kPlain, typename T, bool kExact>
__global__ void __launch_bounds__(kTeamThreads, 1)
    in_place_kernel(Rowwise<T> given, float* losses, float* all_lse, T* logits,
                    const float* dlosses, int64_t dloss_stride) {
  using Columns = Span<kVector<T>, kLogitsHeld, kExact>;
  Team<Found> team(given.blocks);
  const int64_t row = team.number() * blockDim.y + threadIdx.y;
  const bool there = row < given.rows;
  const Target target(there ? given.targets[row] : given.numbers.ignore_index, given.classes,
                      given.numbers);
  T* x_row = logits + (there ? given.place.of(row) : 0);
  Columns span(given.classes, kExact ? 0 : misaligned_by(x_row), team);
  span.begin(there);
  float s_true = 0.f;  // read before anybody may write there
  if (target.counted && target.valid) {
    s_true = score<kPlain>(to_float(x_row[target.index]), given.numbers);
  }

  Held<T, Columns> x;
  const auto fetch = [&] {
    if (target.counted) x.fetch(span, x_row);
  };
  Found found = Found::nothing();
  span.pass(fetch, [&] {
    if (!target.counted) return;
    found = merge(found, find<kPlain>(x, span, target, given.weights, given.numbers));
  });
  found = team.reduce(found);
  __syncwarp();  // sums by shuffles order no memory

  float loss = 0.f, lse = 0.f;
  Known known{0.f, 1.f, 0.f};
  if (target.counted) {
    known = row_loss(loss, lse, found, s_true, given.classes, target, given.weights, given.numbers);
  }
  if (there && team.index() == 0) {
    losses[row] = loss;
    all_lse[row] = lse;
  }
  const float dloss = there && dlosses ? dlosses[row * dloss_stride] : 1.f;
  const Gradient<kPlain, T> gradient(0, given.classes, target, known, dloss, 0.f, given.weights,
                                     given.numbers);
  span.pass(fetch, [&] { gradient.write(x_row, x, span, given.numbers, given.once); });
}

template <typename T>
Rowwise<T> rowwise(const void* logits, const int64_t* targets, const float* weights, int64_t rows,
                   int64_t cols, int64_t classes, Place place, const Numbers& numbers,
                   const Rows& taken) {
  return {static_cast<const T*>(logits), targets,   weights, rows, cols, classes, place, numbers,
          taken.layout.blocks,           taken.once};
}

// Call body with whether scores are the logits themselves, and if rows are held exactly: scores
// that have to be computed leave no time to be saved by that.
template <typename Body>
cudaError_t for_rows(const Numbers& numbers, const Rows& rows, Body body) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (!numbers.plain()) return body(No{}, No{});
  return rows.is_exact ? body(Yes{}, Yes{}) : body(Yes{}, No{});
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
    const bool wide =
        can_vectorise<kVector<T>>(addresses(logits), classes, batch_stride, seq_stride);
    const Rows taken = rows_of<T>(rows, classes, kLogitsHeld, wide);
    const auto given = rowwise<T>(logits, target, weights, rows, classes, classes,
                                  {seq, batch_stride, seq_stride}, numbers, taken);
    return for_rows(numbers, taken, [&](auto plain, auto exact) {
      return launch_rows(forward_kernel<plain.value, T, exact.value>, taken.layout, rows, 0, stream,
                         given, losses, lse, statistics);
    });
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
    const bool wide = can_vectorise<kVector<T>>(addresses(logits, dlogits), cols, batch_stride,
                                                seq_stride, d_batch_stride, d_seq_stride);
    const Rows taken = rows_of<T>(rows, cols, kLogitsHeld, wide);
    const auto given = rowwise<T>(logits, target, weights, rows, cols, classes,
                                  {seq, batch_stride, seq_stride}, numbers, taken);
    return for_rows(numbers, taken, [&](auto plain, auto exact) {
      return launch_rows(backward_kernel<plain.value, T, exact.value>, taken.layout, rows, 0,
                         stream, given, static_cast<T*>(dlogits), dlosses, dlse, statistics, first,
                         Place{seq, d_batch_stride, d_seq_stride});
    });
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
    const bool wide =
        can_vectorise<kVector<T>>(addresses(logits), classes, batch_stride, seq_stride);
    const Rows taken = rows_of<T>(rows, classes, kLogitsHeld, wide);
    const auto given = rowwise<T>(logits, target, weights, rows, classes, classes,
                                  {seq, batch_stride, seq_stride}, numbers, taken);
    return for_rows(numbers, taken, [&](auto plain, auto exact) {
      return launch_rows(in_place_kernel<plain.value, T, exact.value>, taken.layout, rows, 0,
                         stream, given, losses, lse, static_cast<T*>(logits), dlosses,
                         dloss_stride);
    });
  });
}

}  // namespace tilewise
