// The launchers of sampling, a part of launchers.h, which has the rules that hold for all.
#pragma once

#include "launchers.h"

namespace tilewise {

// Whether rows of so many tokens are held by those who work on them. Where they are not, `adjusted`
// is memory of [rows, vocab in whole fours] for the launchers below if there is a history, a bias
// or a mask.
bool sample_is_held(int64_t rows, int64_t vocab);

// x: [rows, vocab]. tokens: [rows]. A row's own numbers: [rows], or null, and then that for all
// counts. history: [rows, length]; bias: [rows, vocab], of stride 0 if it is one for all; mask:
// [rows, words of 32 tokens]; each may be null. Seeds and offsets: one a row where their stride is
// 1, or null, and then the numbers count.
cudaError_t sample_forward(int64_t* tokens, float* adjusted, const void* x, int64_t rows,
                           int64_t vocab, int64_t x_stride, const int64_t* each_top_k,
                           const float* temperatures, const float* top_ps, const float* min_ps,
                           const float* repetitions, const float* presences,
                           const float* frequencies, const int64_t* history, int64_t length,
                           const float* bias, int64_t bias_stride, const int32_t* mask,
                           int64_t mask_stride, int64_t top_k, float temperature, float top_p,
                           float min_p, float repetition, float presence, float frequency,
                           const int64_t* seeds, const int64_t* offsets, int64_t seed_stride,
                           int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
                           cudaStream_t stream);

}  // namespace tilewise
