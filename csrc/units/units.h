// Kernels that use one unit of the GPU each: they show that the wrappers in cuda/ say what they
// mean, and carry the tests of the emulation. They are no part of the library.
// Order of arguments: outputs, inputs, sizes, options, dtype, fault, stream.
#pragma once

#include "units/faults.h"

namespace tilewise::units {

// Copy a box of 64 rows from x to where it lies in `stored`, doubled, by the copy engine; `seen`,
// [64, columns], is the box as threads find it in shared memory. x and stored: [..., rows, columns]
// without gaps, of `rank` dimensions, `sizes` innermost first. The box begins at `at` and may stick
// out; its rows are as long as the swizzle's.
cudaError_t copy_box(void* stored, void* seen, const void* x, int rank, const int64_t* sizes,
                     const int* at, int swizzle, DType dtype, Fault fault, cudaStream_t stream);

// The same of 64 rows, from `row` on, of a packed sequence: `count` rows of x from `first` on, by
// the map that attention makes of them. x, stored: [rows, 64] of bf16.
cudaError_t copy_sequence(void* stored, void* seen, const void* x, int rows, int first, int count,
                          int row, cudaStream_t stream);

constexpr int kBoxRows = 64;

// c = a b in fp32 by one warpgroup; a: [64, 64], b: [64, cols], either or its transpose. cols is a
// multiple of 16 up to 256; all but 128 are for bf16, a in shared memory and only b transposed.
cudaError_t wgmma_tile(float* c, const void* a, const void* b, int64_t cols, bool a_registers,
                       bool a_transposed, bool b_transposed, int swizzle, DType dtype, Fault fault,
                       cudaStream_t stream);

// c = a b in fp32 by single warps; a: [rows, depth], b: [depth, cols], or its transpose. Copies are
// of copy_bytes, 4, 8 or 16, which divide a row.
cudaError_t mma_tiles(float* c, const void* a, const void* b, int64_t rows, int64_t cols,
                      int64_t depth, bool b_transposed, int copy_bytes, DType dtype, Fault fault,
                      cudaStream_t stream);

// c = a b in fp32 of operands rounded to tf32; a: [16, 8], b: [8, 8].
cudaError_t mma_tf32_tile(float* c, const float* a, const float* b, cudaStream_t stream);

// y[block, i] = sum of (rank + 1) * x[block of that rank, i] over the cluster, plus 100 times what
// the block before it in the cluster has. y, x: [blocks, 128].
cudaError_t cluster_exchange(float* y, const float* x, int64_t blocks, int cluster, Fault fault,
                             cudaStream_t stream);

// y = 1, by a kernel that with a fault breaks a rule of one instruction. y: [blocks, 128], tile:
// [64, 64] of bf16.
cudaError_t keep_rules(float* y, void* tile, int64_t blocks, Fault fault, cudaStream_t stream);

// c = a b^T with all of it at once: a producer warp, two consumer warpgroups, a ring of tiles.
// c: [rows, cols], a: [rows, depth], b: [cols, depth]; depth and cols are multiples of 8.
cudaError_t gemm(void* c, const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth,
                 DType dtype, Fault fault, cudaStream_t stream);

}  // namespace tilewise::units
