// The launchers of attention, a part of launchers.h, which has the rules that hold for all.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tilewise {

enum class DType;

// q: [batch, heads, seq_q, dim], k, v: [batch, kv_heads, seq_k, dim | v_dim], out: [batch, heads,
// seq_q, v_dim], of any strides but the last, which is 1; kv_heads divides heads. highest, total:
// [batch, heads, seq_q]: the highest score and sink of a row, in units of log 2, and the sum of the
// powers of two above it. mask, bias: [batch, heads, seq_q, seq_k], with strides of 0 where they
// are broadcast; keys that a mask hides from all queries alike, by a stride of 0, are not
// multiplied.
// slopes: [batch, heads], sinks: [heads]; any of these may be null. left, right: how many keys
// beside its own place a query sees, -1 all. softcap: 0 is none. Seeds and offsets: one number
// each, or null. dtype: f16 or bf16; that of bias and of sinks is the same or f32.
//
// ends_q, ends_k: null, or [batch + 1]: where sequences packed one after the other begin and end
// among rows_q and rows_k rows. Then seq_q and seq_k are those of the longest, strides of batches
// are those of rows but for bias and slopes, what is [batch, heads, seq_q] is [heads, rows_q],
// there is no mask, and rows of no sequence are not written.
cudaError_t attention_forward(
    void* out, float* highest, float* total, const void* q, const void* k, const void* v,
    const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t out_batch, int64_t out_head, int64_t out_row, int64_t q_batch, int64_t q_head,
    int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head,
    int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query, int64_t mask_key,
    int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
    DType bias_dtype, DType sinks_dtype, cudaStream_t stream);

// Decoding. k, v: [pages, kv_heads, page_size, dim or v_dim] by strides, table [batch, pages of a
// sequence]; without a table page i is sequence i. lengths: [batch], the new queries included, of
// at most `capacity`. work: [batch, heads, seq_q, splits of kDecodeSplit keys, 2 + v_dim].
constexpr int64_t kDecodeSplit = 256;
cudaError_t attention_decode_forward(
    void* out, float* lse, float* work, const void* q, const void* k, const void* v,
    const int32_t* lengths, const int32_t* table, const float* slopes, const void* sinks,
    int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq_q, int64_t dim, int64_t v_dim,
    int64_t capacity, int64_t page_size, int64_t pages, int64_t out_batch, int64_t out_head,
    int64_t out_row, int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_page, int64_t k_head,
    int64_t k_row, int64_t v_page, int64_t v_head, int64_t v_row, int64_t table_row,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, float softcap, float scale,
    DType dtype, DType sinks_dtype, cudaStream_t stream);

// Write k and v, [batch, kv_heads, seq, dim or v_dim], behind `lengths`; tables: [positions, half].
cudaError_t attention_append(void* k_cache, void* v_cache, const void* k, const void* v,
                             const int32_t* lengths, const int32_t* table, const void* cos,
                             const void* sin, int64_t batch, int64_t kv_heads, int64_t seq,
                             int64_t dim, int64_t v_dim, int64_t half, int64_t positions,
                             int64_t capacity, int64_t page_size, int64_t pages,
                             int64_t k_cache_page, int64_t k_cache_head, int64_t k_cache_row,
                             int64_t v_cache_page, int64_t v_cache_head, int64_t v_cache_row,
                             int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
                             int64_t v_head, int64_t v_row, int64_t table_row, int64_t cos_stride,
                             int64_t sin_stride, bool interleaved, DType dtype, DType table_dtype,
                             cudaStream_t stream);

// dq: null is not wanted. dbias: null, or [batch, heads, seq_q, seq_k] in the dtype, the gradient of
// a bias like it where there is no softcap, written where a tile is seen; as exact as out is.
// statistics: [3, batch, heads, seq_q], of a row the highest score, 1 / the sum, and delta = sum(dout out) - dlse; exact: of out as it was before it was rounded. dlse:
// [batch, heads, seq_q] or null.
cudaError_t attention_queries_backward(
    void* dq, void* dbias, float* statistics, const void* dout, const float* dlse, const void* out,
    const float* highest, const float* total, const void* q, const void* k, const void* v,
    const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dq_batch, int64_t dq_head, int64_t dq_row, int64_t dout_batch, int64_t dout_head,
    int64_t dout_row, int64_t out_batch, int64_t out_head, int64_t out_row, int64_t q_batch,
    int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
    int64_t v_head, int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query,
    int64_t mask_key, int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, bool exact,
    DType dtype, DType bias_dtype, DType sinks_dtype, cudaStream_t stream);

// The statistics are those of attention_queries_backward. dbias: [parts, bias_batches, bias_heads,
// bias_queries, seq_k], of which each but the parts is 1 where the bias is the same for all; fp32,
// or if there is one part of the bias' own dtype: the sum over the parts is the gradient. A block
// has kBiasTile queries and keys of a part.
constexpr int64_t kBiasTile = 64;
cudaError_t attention_bias_backward(
    void* dbias, const void* dout, const float* statistics, const void* q, const void* k,
    const void* v, const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dout_batch, int64_t dout_head, int64_t dout_row, int64_t q_batch, int64_t q_head,
    int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head,
    int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query, int64_t mask_key,
    int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, int64_t bias_batches,
    int64_t bias_heads, int64_t bias_queries, int64_t parts, DType dtype, DType bias_dtype,
    DType sinks_dtype, cudaStream_t stream);

// The statistics are those of attention_queries_backward.
cudaError_t attention_keys_backward(
    void* dk, void* dv, const void* dout, const float* statistics, const void* q, const void* k,
    const void* v, const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dk_batch, int64_t dk_head, int64_t dk_row, int64_t dv_batch, int64_t dv_head,
    int64_t dv_row, int64_t dout_batch, int64_t dout_head, int64_t dout_row, int64_t q_batch,
    int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch,
    int64_t v_head, int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query,
    int64_t mask_key, int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, DType dtype,
    DType bias_dtype, DType sinks_dtype, cudaStream_t stream);

}  // namespace tilewise
