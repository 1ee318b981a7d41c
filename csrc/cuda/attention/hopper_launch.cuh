// What the launchers of attention on Hopper have in common: which tensors the copy engine can find
// its way through.
#pragma once

#include "cuda/attention/hopper.cuh"

namespace tilewise {

constexpr int64_t kLastingBytes = 32ll << 20;    // of keys and values that stay in L2 together
constexpr int64_t kMostStrideBytes = 1ll << 40;  // of a tensor map, that is too many

template <typename T>
cudaError_t make_map(CUtensorMap* map, const Heads<T>& x, int64_t batch, int64_t heads, int64_t seq,
                     int64_t dim, int rows) {
  using Bare = std::remove_const_t<T>;
  constexpr DType kType = std::is_same_v<Bare, __half> ? DType::f16 : DType::bf16;
  const auto stride = [&](int64_t size, int64_t told) { return size > 1 ? told : dim; };
  return make_tensor_map(map, kType, x.at, {dim, seq, heads, batch},
                         {stride(seq, x.row), stride(heads, x.head), stride(batch, x.batch)},
                         {kPanelCols, rows, 1, 1}, Swizzle::bytes128);
}

// Whether a tensor map can have these strides: positive ones, of what there is more than one of.
template <typename T>
bool has_map(const Heads<T>& x, int64_t batch, int64_t heads, int64_t seq) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (0 < stride && stride < kMostStrideBytes / int64_t{sizeof(T)});
  };
  return fits(batch, x.batch) && fits(heads, x.head) && fits(seq, x.row);
}

}  // namespace tilewise
