// The launchers of sampling, a part of launchers.h, which has the rules that hold for all.
//
// x: [rows, vocab]. A row's own numbers: [rows], or null, and then that for all counts. history:
// [rows, length]; bias: [rows, vocab], of stride 0 if it is one for all; mask: [rows, words of 32
// tokens]; each may be null. Rows that are not held must come without them, from sample_adjust.
#pragma once

#include "launchers.h"

namespace tilewise {

// Whether rows of so many tokens are held by those who work on them.
bool sample_is_held(int64_t rows, int64_t vocab);

// y: [rows, vocab in whole fours], -inf behind a row.
cudaError_t sample_adjust(float* y, const void* x, int64_t rows, int64_t vocab, int64_t x_stride,
                          const float* repetitions, const float* presences,
                          const float* frequencies, const int64_t* history, int64_t length,
                          const float* bias, int64_t bias_stride, const int32_t* mask,
                          int64_t mask_stride, float repetition, float presence, float frequency,
                          DType dtype, cudaStream_t stream);

// tokens: [rows]. Seeds and offsets: one a row where their stride is 1, or null, and then the
// numbers count.
cudaError_t sample_forward(int64_t* tokens, const void* x, int64_t rows, int64_t vocab,
                           int64_t x_stride, const int64_t* each_top_k, const float* temperatures,
                           const float* top_ps, const float* min_ps, const float* repetitions,
                           const float* presences, const float* frequencies, const int64_t* history,
                           int64_t length, const float* bias, int64_t bias_stride,
                           const int32_t* mask, int64_t mask_stride, int64_t top_k,
                           float temperature, float top_p, float min_p, float repetition,
                           float presence, float frequency, const int64_t* seeds,
                           const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                           int64_t seed, int64_t offset, DType dtype, cudaStream_t stream);

// of_token, tokens: [rows], drawn from x; of_first, first: [rows, wanted], those of the likeliest.
// room: [rows, room_stride], the least power of two that is not below wanted. is_processed: after
// all filters.
cudaError_t sample_logprobs(float* of_token, float* of_first, int64_t* first, int64_t* room,
                            const int64_t* tokens, const void* x, int64_t rows, int64_t vocab,
                            int64_t x_stride, int64_t wanted, int64_t room_stride,
                            bool is_processed, const int64_t* each_top_k, const float* temperatures,
                            const float* top_ps, const float* min_ps, const float* repetitions,
                            const float* presences, const float* frequencies,
                            const int64_t* history, int64_t length, const float* bias,
                            int64_t bias_stride, const int32_t* mask, int64_t mask_stride,
                            int64_t top_k, float temperature, float top_p, float min_p,
                            float repetition, float presence, float frequency, DType dtype,
                            cudaStream_t stream);

// values, indices: [rows, wanted]. room: as above.
cudaError_t sample_top_k(void* values, int64_t* indices, int64_t* room, const void* x, int64_t rows,
                         int64_t vocab, int64_t x_stride, int64_t wanted, int64_t room_stride,
                         DType dtype, cudaStream_t stream);

// Several draws from each row. places: [rows, count]. Rows that are not held must come without
// weights: as scores, from sample_scores. Draw n is at the offset + n, of weights or logits:
cudaError_t sample_several(int64_t* places, const void* x, int64_t rows, int64_t vocab,
                           int64_t x_stride, int64_t count, bool are_weights, const int64_t* seeds,
                           const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                           int64_t seed, int64_t offset, DType dtype, cudaStream_t stream);

// None twice, of weights, or of scores with noise. room: as above.
cudaError_t sample_distinct(int64_t* places, int64_t* room, const void* x, int64_t rows,
                            int64_t vocab, int64_t x_stride, int64_t count, int64_t room_stride,
                            bool are_weights, const int64_t* seeds, const int64_t* offsets,
                            int64_t seed_stride, int64_t offset_stride, int64_t seed,
                            int64_t offset, DType dtype, cudaStream_t stream);

// y: [rows, vocab in whole fours], the logarithms of weights, with or without noise.
cudaError_t sample_scores(float* y, const void* x, int64_t rows, int64_t vocab, int64_t x_stride,
                          bool has_noise, const int64_t* seeds, const int64_t* offsets,
                          int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset,
                          DType dtype, cudaStream_t stream);

// Which drafts stand. accepted: [batch]; tokens: [batch, draft + 1]; stands, of which nobody need
// know: [batch, draft]. draft_tokens: [batch, draft], draft_probabilities: [batch, draft, vocab].
// x, and what a row has of its own: [batch, draft + 1]; seeds and offsets: [batch].
cudaError_t sample_verify(int64_t* accepted, int64_t* tokens, int32_t* stands,
                          const int64_t* draft_tokens, const float* draft_probabilities,
                          const void* x, int64_t batch, int64_t draft, int64_t vocab,
                          int64_t x_stride, const int64_t* each_top_k, const float* temperatures,
                          const float* top_ps, const float* min_ps, const float* repetitions,
                          const float* presences, const float* frequencies, const int64_t* history,
                          int64_t length, const float* bias, int64_t bias_stride,
                          const int32_t* mask, int64_t mask_stride, int64_t top_k,
                          float temperature, float top_p, float min_p, float repetition,
                          float presence, float frequency, const int64_t* seeds,
                          const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                          int64_t seed, int64_t offset, DType dtype, cudaStream_t stream);

constexpr int kTileTokens = 128;  // of linear logits, whose best are kept

// Draws from hidden weight^T + bias. hidden: [rows, dim]; weight: [vocab, dim]; bias: [vocab], or
// null. floats, columns: [2, rows, tiles of so many tokens], of which nobody need know.
cudaError_t sample_linear(int64_t* tokens, float* floats, int32_t* columns, const void* hidden,
                          const void* weight, const void* bias, int64_t rows, int64_t vocab,
                          int64_t dim, int64_t hidden_stride, int64_t weight_stride,
                          const float* temperatures, float temperature, const int64_t* seeds,
                          const int64_t* offsets, int64_t seed_stride, int64_t offset_stride,
                          int64_t seed, int64_t offset, DType dtype, cudaStream_t stream);

// Either of kept, in the dtype of x, and probabilities: [rows, vocab], is null.
cudaError_t sample_filter(void* kept, float* probabilities, const void* x, int64_t rows,
                          int64_t vocab, int64_t x_stride, const int64_t* each_top_k,
                          const float* temperatures, const float* top_ps, const float* min_ps,
                          const float* repetitions, const float* presences,
                          const float* frequencies, const int64_t* history, int64_t length,
                          const float* bias, int64_t bias_stride, const int32_t* mask,
                          int64_t mask_stride, int64_t top_k, float temperature, float top_p,
                          float min_p, float repetition, float presence, float frequency,
                          DType dtype, cudaStream_t stream);

}  // namespace tilewise
