// Launches of kernels that go along rows: which of them, on how many threads.
#pragma once

#include "cuda/cluster_launch.cuh"
#include "cuda/layout.cuh"
#include "cuda/span.cuh"

namespace tilewise {

// What is longer than this does not stay in L2 until somebody reads it.
constexpr int64_t kLastingBytes = 25 << 20;

// What the GPU that is launched on can do.
struct Machine {
  bool has_clusters;
  int64_t shared_bytes;  // that a block can have
};

inline Machine machine() {
  return {attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// How the rows of an op are worked on.
struct Rows {
  Layout layout;
  bool is_exact;  // the team holds a row, in whole and aligned accesses
  bool once;      // what is written will not stay in L2
};

// `held`: accesses that threads of the kernel hold. `wide`: what can_vectorise() says of all
// arrays.
template <typename T>
Rows rows_of(int64_t rows, int64_t cols, int held, bool wide) {
  const int64_t accesses = ceil_divided(cols + (wide ? 0 : kVector<T> - 1), kVector<T>);
  const Layout layout = layout_for(accesses, held, machine().has_clusters);
  return {layout, wide && layout.held <= held, rows * cols * int64_t{sizeof(T)} > kLastingBytes};
}

// Call body with what the kernel is compiled for: how many accesses are held, and if exactly. Where
// kHasFew it is compiled for few of them too.
template <int kHeld, bool kHasFew, typename Body>
cudaError_t for_held(const Rows& rows, Body body) {
  if (!rows.is_exact) return body(std::integral_constant<int, kHeld>{}, std::false_type{});
  if constexpr (kHasFew) {
    if (rows.layout.rows > 1 && rows.layout.held <= kFewHeld) {
      return body(std::integral_constant<int, kFewHeld>{}, std::true_type{});
    }
  }
  return body(std::integral_constant<int, kHeld>{}, std::true_type{});
}

// Launch this many teams, and others to fill up the last block.
template <typename... Parameters>
cudaError_t launch_rows(void (*kernel)(Parameters...), const Layout& layout, int64_t teams,
                        int64_t shared, cudaStream_t stream,
                        std::common_type_t<Parameters>... arguments) {
  const int64_t blocks = ceil_divided(teams, layout.rows) * layout.blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 threads(static_cast<unsigned>(layout.threads), static_cast<unsigned>(layout.rows));
  return launch_clusters(kernel, blocks, layout.blocks, threads, shared, stream, arguments...);
}

}  // namespace tilewise
