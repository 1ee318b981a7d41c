// Sums over rows, for the gradients of weights, without atomics: a team sums the rows of its part
// into columns of its own, and the parts are then added in a fixed order.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/span.cuh"

namespace tilewise {

// The sums of one array that the teams of a block let grow: in shared memory, where four sums of
// each thread lie beside those of the next, or, too long for that, in the part itself, and then a
// block has one team. A thread touches its own columns only, until the part is written.
template <typename Span>
class ColumnSums {
 public:
  // `part`: [cols], nullptr if nobody wants the sums. `array`: which this is of those wanted.
  __device__ ColumnSums(float* part, bool in_shared, int array, const Span& span)
      : part_(part), in_shared_(in_shared), team_(span.accesses() * kGroups * blockDim.x) {
    TILEWISE_DYNAMIC_SHARED(all, Four);
    sums_ = all + array * team_ * blockDim.y + threadIdx.x;
  }

  __device__ bool wanted() const { return part_ != nullptr; }

  __device__ void clear(Span& span) {
    if (!wanted()) return;
    const float zeros[Span::kWidth] = {};
    span.pass([] {}, [&] { span.each([&](int k, auto col) { put(span, k, col, zeros); }); });
  }

  __device__ void add(const Span& span, int k, typename Span::Column col,
                      const float (&values)[Span::kWidth]) {
    float v[Span::kWidth];
    get(v, span, k, col, threadIdx.y);
#pragma unroll
    for (int i = 0; i < Span::kWidth; ++i) v[i] += values[i];
    put(span, k, col, v);
  }

  // Write the sums of all teams, in their order; each team does some of the columns.
  __device__ void finish(Span& span) {
    if (!wanted() || !in_shared_) return;
    span.pass([] {},
              [&] {
                span.each([&](int k, auto col) {
                  if (span.access(k) % blockDim.y != threadIdx.y) return;
                  float v[Span::kWidth], other[Span::kWidth];
                  get(v, span, k, col, 0);
                  for (int team = 1; team < static_cast<int>(blockDim.y); ++team) {
                    get(other, span, k, col, team);
#pragma unroll
                    for (int i = 0; i < Span::kWidth; ++i) v[i] += other[i];
                  }
                  span.write(part_, col, packed<float>(v), false);
                });
              });
  }

 private:
  using Four = Pack<float, 4>;
  static constexpr int kGroups = Span::kWidth / 4;

  __device__ Four* at(const Span& span, int k, int group, int team) const {
    return sums_ + team * team_ + (span.access(k) * kGroups + group) * blockDim.x;
  }

  __device__ void get(float (&v)[Span::kWidth], const Span& span, int k, typename Span::Column col,
                      int team) const {
    if (!in_shared_) return unpack(v, span.read(part_, col, false));
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Four four = *at(span, k, group, team);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * group + i] = four.at[i];
    }
  }

  __device__ void put(const Span& span, int k, typename Span::Column col,
                      const float (&v)[Span::kWidth]) {
    if (!in_shared_) return span.write(part_, col, packed<float>(v), false);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      *at(span, k, group,
          threadIdx.y) = {{v[4 * group], v[4 * group + 1], v[4 * group + 2], v[4 * group + 3]}};
    }
  }

  float* part_;
  Four* sums_;
  bool in_shared_;
  int team_;  // Fours of each
};

// Bytes of shared memory that the sums of this many arrays take, where kHeld accesses of kWidth
// columns are held.
constexpr int64_t column_sums_bytes(const Layout& layout, int held, int width, int arrays) {
  const int64_t accesses = ceil_divided(layout.held, held) * held;
  return accesses * width * layout.threads * layout.rows * arrays * int64_t{sizeof(float)};
}

constexpr int kColumnThreads = 16;

namespace {

// out[col] = sum over row of parts[row, col], for one or two arrays. Blocks of (32, 16): 32
// columns, 16 threads on each.
template <typename T>
__global__ void column_sums_kernel(T* out, T* second_out, const float* parts,
                                   const float* second_parts, int64_t rows, int64_t cols,
                                   int64_t blocks) {
  TILEWISE_SHARED(sums, float[kColumnThreads][kWarpSize]);
  const bool is_second = blockIdx.x >= blocks;
  const int64_t col = (blockIdx.x - is_second * blocks) * kWarpSize + threadIdx.x;
  const float* part = is_second ? second_parts : parts;

  float sum = 0.f;
  for (int64_t row = threadIdx.y; row < rows && col < cols; row += kColumnThreads) {
    sum += part[row * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();

  if (threadIdx.y == 0 && col < cols) {
    for (int y = 1; y < kColumnThreads; ++y) sum += sums[y][threadIdx.x];
    (is_second ? second_out : out)[col] = from_float<T>(sum);
  }
}

// Arrays without parts are left alone.
template <typename T>
cudaError_t column_sums(T* out, T* second_out, const float* parts, const float* second_parts,
                        int64_t rows, int64_t cols, cudaStream_t stream) {
  if (!parts) {
    std::swap(out, second_out);
    std::swap(parts, second_parts);
  }
  if (!parts) return cudaSuccess;
  const int64_t blocks = ceil_divided(cols, kWarpSize);
  return launch(column_sums_kernel<T>, second_parts ? 2 * blocks : blocks,
                dim3(kWarpSize, kColumnThreads), 0, stream, out, second_out, parts, second_parts,
                rows, cols, blocks);
}

template <typename T>
cudaError_t column_sum(T* out, const float* parts, int64_t rows, int64_t cols,
                       cudaStream_t stream) {
  return column_sums<T>(out, nullptr, parts, nullptr, rows, cols, stream);
}

}  // namespace

}  // namespace tilewise
