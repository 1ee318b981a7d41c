// Embedding: rows of up to three tables added, normalised and dropped out in one pass. A row is
// gathered anew for each pass over it, all but the first from L1.
//
// Backward takes the gradient back to the sum of the rows, once for all tables. Then rows are
// walked by id, in chunks: a run of one id within a chunk goes to the gradient at once, and what a
// run leaves of other chunks is joined after, in order.
#include "cuda/dropout.cuh"
#include "cuda/growing_sums.cuh"
#include "cuda/lookup.cuh"
#include "cuda/reduce.cuh"

namespace tilewise {
namespace {

constexpr int64_t kWalkWarps = 8;  // of a block that walks rows

template <int kWidth, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    forward_kernel(T* y, float* mean, float* rstd, Tables<T> tables, const W* weight, const W* bias,
                   Dropout dropout, int64_t rows, int64_t cols, float eps) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const Place<T> place = find(tables, row);
    float m = 0.f, r = 1.f;
    if (weight) {
      float sum = 0.f;
      for_columns<kWidth>(cols, [&](int64_t col) {
        float v[kWidth];
        gather(v, place, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += v[i];
      });
      m = row_sum(sum) / cols;
      float square_sum = 0.f;
      for_columns<kWidth>(cols, [&](int64_t col) {
        float v[kWidth];
        gather(v, place, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) square_sum += (v[i] - m) * (v[i] - m);
      });
      r = rsqrtf(row_sum(square_sum) / cols + eps);
      if (threadIdx.x == 0) {
        mean[row] = m;
        rstd[row] = r;
      }
    }

    for_columns<kWidth>(cols, [&](int64_t col) {
      float v[kWidth];
      gather(v, place, col);
      if (weight) {
        float w[kWidth], b[kWidth];
        load(w, weight + col);
        load_or(0.f, b, bias, col);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) v[i] = (v[i] - m) * r * w[i] + b[i];
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = place.there ? v[i] : NAN;
      drop(v, dropout, row, col);
      store(y + row * cols + col, v);
    });
  }
}

// For sm_100 ptxas keeps a few values more than two blocks leave room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNormBlocks = 1;
#else
constexpr int kNormBlocks = kMinBlocks;
#endif

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with g = dy * weight and xhat = (x - mean) *
// rstd, unless nobody wants it; and the sums over rows for the weight and the bias, unless there is
// no place for them. Without a weight dx is what dropout leaves of dy.
template <int kWidth, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, kNormBlocks)
    rows_backward_kernel(float* dx, float* dweight_parts, float* dbias_parts, const T* dy,
                         Tables<T> tables, const W* weight, const float* mean, const float* rstd,
                         Dropout dropout, int64_t rows, int64_t cols, int64_t dy_stride,
                         int64_t parts, bool in_shared) {
  const int64_t part = first_row();
  if (part >= parts) return;
  float* dweight = growing_sums(dweight_parts, part, cols, in_shared, 0);
  float* dbias = growing_sums(dbias_parts, part, cols, in_shared, 1);
  if (dweight_parts) {
    clear<kWidth>(dweight, cols);
    clear<kWidth>(dbias, cols);
  }

  for (int64_t row = part; row < rows; row += parts) {
    const Place<T> place = find(tables, row);
    const T* dy_row = dy + row * dy_stride;
    float m = 0.f, r = 1.f, means[2] = {};  // of g, of g * xhat
    if (weight) {
      if (place.there) {
        m = mean[row];
        r = rstd[row];
        for_columns<kWidth>(cols, [&](int64_t col) {
          float d[kWidth], v[kWidth], w[kWidth];
          load(d, dy_row + col);
          drop(d, dropout, row, col);
          gather(v, place, col);
          load(w, weight + col);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            v[i] = (v[i] - m) * r;
            means[0] += d[i] * w[i];
            means[1] += d[i] * w[i] * v[i];
            v[i] *= d[i];
          }
          if (dweight_parts) {
            add(dweight + col, v);
            add(dbias + col, d);
          }
        });
      }
      row_reduce(means, Sum{});
      means[0] /= cols;
      means[1] /= cols;
    }
    if (!dx) continue;

    for_columns<kWidth>(cols, [&](int64_t col) {
      float d[kWidth] = {};
      if (place.there) {
        load(d, dy_row + col);
        drop(d, dropout, row, col);
        if (weight) {
          float v[kWidth], w[kWidth];
          gather(v, place, col);
          load(w, weight + col);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            d[i] = r * (d[i] * w[i] - means[0] - (v[i] - m) * r * means[1]);
          }
        }
      }
      store(dx + row * cols + col, d);
    });
  }

  if (dweight_parts && in_shared) {
    copy<kWidth>(dweight_parts + part * cols, dweight, cols);
    copy<kWidth>(dbias_parts + part * cols, dbias, cols);
  }
}

// Rows in the order of their ids: the k-th is row lap * period + order[turn], with id keys[turn],
// where turn = k / repeats and lap = k % repeats.
struct Runs {
  const int64_t *keys, *order;  // null: as they come
  int64_t rows, period, repeats, chunk_rows, chunks, table_rows, padding;

  __device__ int64_t key(int64_t turn) const { return keys ? keys[turn] : turn; }
  __device__ int64_t key_of(int64_t k) const { return key(k / repeats); }
  // Whether rows of this id have a gradient.
  __device__ bool counts(int64_t key) const {
    return key >= 0 && key < table_rows && key != padding;
  }
};

// D, of dx, is T or fp32.
template <int kWidth, typename T, typename D>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    table_backward_kernel(T* dtable, float* parts, const D* dx, Runs runs, Tables<T> tables,
                          int64_t cols, int64_t dx_stride, int64_t across) {
  const int64_t chunk = blockIdx.x / across;
  const int64_t col = (blockIdx.x % across * blockDim.x + threadIdx.x) * kWidth;
  if (col >= cols) return;
  float total[kWidth] = {};

  const int64_t first = chunk * runs.chunk_rows;
  const int64_t last = first + runs.chunk_rows < runs.rows ? first + runs.chunk_rows : runs.rows;
  int64_t turn = first / runs.repeats, lap = first % runs.repeats, key = runs.key(turn);
  bool began_before = first > 0 && runs.key_of(first - 1) == key;
  for (int64_t k = first; k < last; ++k) {
    const int64_t row = lap * runs.period + (runs.order ? runs.order[turn] : turn);
    const bool counts = runs.counts(key);
    if (counts && find(tables, row).there) {
      float d[kWidth];
      load(d, dx + row * dx_stride + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[i] += d[i];
    }

    if (++lap == runs.repeats) {
      lap = 0;
      ++turn;
    }
    const bool ends = k + 1 == runs.rows || runs.key(turn) != key;
    if (!ends && k + 1 < last) continue;
    if (counts && ends && !began_before) {
      store(dtable + key * cols + col, total);
    } else if (counts) {
      store(parts + (2 * chunk + (began_before ? 0 : 1)) * cols + col, total);
    }
    if (k + 1 == last) break;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total[i] = 0.f;
    began_before = false;
    key = runs.key(turn);
  }
}

// Add up a run that began in this chunk and goes on in others. Blocks of (32, 16), as column_sums.
template <typename T>
__global__ void join_kernel(T* dtable, const float* parts, Runs runs, int64_t cols,
                            int64_t across) {
  TILEWISE_SHARED(sums, float[kColumnThreads][kWarpSize]);
  const int64_t chunk = blockIdx.x / across;
  const int64_t col = blockIdx.x % across * kWarpSize + threadIdx.x;
  const int64_t first = chunk * runs.chunk_rows, following = first + runs.chunk_rows;
  if (following >= runs.rows) return;
  const int64_t key = runs.key_of(following - 1);
  const bool began_before = first > 0 && runs.key_of(first - 1) == key;
  if (began_before || runs.key_of(following) != key || !runs.counts(key)) return;

  float sum = 0.f;
  for (int64_t other = chunk + 1 + threadIdx.y;
       other < runs.chunks && runs.key_of(other * runs.chunk_rows) == key;
       other += kColumnThreads) {
    if (col < cols) sum += parts[2 * other * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && col < cols) {
    float total = parts[(2 * chunk + 1) * cols + col];
    for (int y = 0; y < kColumnThreads; ++y) total += sums[y][threadIdx.x];
    dtable[key * cols + col] = from_float<T>(total);
  }
}

}  // namespace

cudaError_t embed_forward(void* y, float* mean, float* rstd, const int64_t* token_ids,
                          const void* token_table, int64_t tokens, int64_t token_stride,
                          int64_t token_period, const int64_t* position_ids,
                          const void* position_table, int64_t positions, int64_t position_stride,
                          int64_t position_period, const int64_t* segment_ids,
                          const void* segment_table, int64_t segments, int64_t segment_stride,
                          int64_t segment_period, const void* weight, const void* bias,
                          int64_t threshold, float scale, const int64_t* seeds,
                          const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                          int64_t seed, int64_t offset, int64_t rows, int64_t cols, float eps,
                          DType dtype, DType weight_dtype, cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const Tables<T> tables{
        table_of<T>(token_ids, token_table, tokens, token_stride, token_period),
        table_of<T>(position_ids, position_table, positions, position_stride, position_period),
        table_of<T>(segment_ids, segment_table, segments, segment_stride, segment_period)};
    const Dropout dropout{threshold,   scale,         seeds, offsets,
                          seed_stride, offset_stride, seed,  offset};
    const bool wide = can_vectorise<kVector<T>>(
        addresses(y, token_table, position_table, segment_table, weight, bias), cols, token_stride,
        position_stride, segment_stride);
    const auto kernel = wide ? forward_kernel<kVector<T>, T, W> : forward_kernel<1, T, W>;
    const dim3 threads = threads_for(cols, wide ? kVector<T> : 1);
    return launch(kernel, blocks_for(rows, threads), threads, 0, stream, static_cast<T*>(y), mean,
                  rstd, tables, static_cast<const W*>(weight), static_cast<const W*>(bias), dropout,
                  rows, cols, eps);
  });
}

cudaError_t embed_rows_backward(
    float* dx, void* dweight, void* dbias, float* dweight_parts, float* dbias_parts, const void* dy,
    const int64_t* token_ids, const void* token_table, int64_t tokens, int64_t token_stride,
    int64_t token_period, const int64_t* position_ids, const void* position_table,
    int64_t positions, int64_t position_stride, int64_t position_period, const int64_t* segment_ids,
    const void* segment_table, int64_t segments, int64_t segment_stride, int64_t segment_period,
    const void* weight, const float* mean, const float* rstd, int64_t threshold, float scale,
    const int64_t* seeds, const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
    int64_t seed, int64_t offset, int64_t rows, int64_t cols, int64_t dy_stride, int64_t parts,
    DType dtype, DType weight_dtype, cudaStream_t stream) {
  return for_dtypes(dtype, weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const Tables<T> tables{
        table_of<T>(token_ids, token_table, tokens, token_stride, token_period),
        table_of<T>(position_ids, position_table, positions, position_stride, position_period),
        table_of<T>(segment_ids, segment_table, segments, segment_stride, segment_period)};
    const Dropout dropout{threshold,   scale,         seeds, offsets,
                          seed_stride, offset_stride, seed,  offset};
    const bool wide =
        can_vectorise<kVector<T>>(addresses(dx, dweight_parts, dbias_parts, dy, token_table,
                                            position_table, segment_table, weight),
                                  cols, dy_stride, token_stride, position_stride, segment_stride);
    const auto kernel =
        wide ? rows_backward_kernel<kVector<T>, T, W> : rows_backward_kernel<1, T, W>;
    const cudaError_t status = launch_parts(
        kernel, dweight_parts ? 2 : 0, parts, cols, threads_for(cols, wide ? kVector<T> : 1),
        stream, dx, dweight_parts, dbias_parts, static_cast<const T*>(dy), tables,
        static_cast<const W*>(weight), mean, rstd, dropout, rows, cols, dy_stride, parts);
    if (status != cudaSuccess) return status;
    return column_sums(static_cast<W*>(dweight), static_cast<W*>(dbias),
                       dweight ? dweight_parts : nullptr, dbias ? dbias_parts : nullptr, parts,
                       cols, stream);
  });
}

cudaError_t embed_table_backward(
    void* dtable, float* parts, const void* dx, const int64_t* keys, const int64_t* order,
    int64_t period, int64_t table_rows, int64_t padding, int64_t chunk_rows, int64_t chunks,
    const int64_t* token_ids, const void* token_table, int64_t tokens, int64_t token_stride,
    int64_t token_period, const int64_t* position_ids, const void* position_table,
    int64_t positions, int64_t position_stride, int64_t position_period, const int64_t* segment_ids,
    const void* segment_table, int64_t segments, int64_t segment_stride, int64_t segment_period,
    int64_t rows, int64_t cols, int64_t dx_stride, DType dtype, DType dx_dtype,
    cudaStream_t stream) {
  if (rows == 0 || cols == 0 || period == 0) return cudaErrorInvalidValue;
  return for_dtypes(dtype, dx_dtype, [&](auto t, auto d) {
    using T = typename decltype(t)::type;
    using D = typename decltype(d)::type;
    const Tables<T> tables{
        table_of<T>(token_ids, token_table, tokens, token_stride, token_period),
        table_of<T>(position_ids, position_table, positions, position_stride, position_period),
        table_of<T>(segment_ids, segment_table, segments, segment_stride, segment_period)};
    const Runs runs{keys,       order,  rows,       period, rows / period,
                    chunk_rows, chunks, table_rows, padding};
    const bool wide = can_vectorise<kVector<T>>(addresses(dtable, parts, dx), cols, dx_stride);
    const int width = wide ? kVector<T> : 1;
    const auto kernel =
        wide ? table_backward_kernel<kVector<T>, T, D> : table_backward_kernel<1, T, D>;
    const int64_t warps = (cols + width * kWarpSize - 1) / (width * kWarpSize);
    const int64_t threads = std::min<int64_t>(warps, kWalkWarps) * kWarpSize;
    int64_t across = (cols + threads * width - 1) / (threads * width);
    const cudaError_t status =
        launch(kernel, chunks * across, dim3(static_cast<unsigned>(threads)), 0, stream,
               static_cast<T*>(dtable), parts, static_cast<const D*>(dx), runs, tables, cols,
               dx_stride, across);
    if (status != cudaSuccess) return status;
    across = (cols + kWarpSize - 1) / kWarpSize;
    return launch(join_kernel<T>, chunks * across, dim3(kWarpSize, kColumnThreads), 0, stream,
                  static_cast<T*>(dtable), static_cast<const float*>(parts), runs, cols, across);
  });
}

}  // namespace tilewise
