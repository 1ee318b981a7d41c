// What the launchers of attention on Hopper have in common: which tensors the copy engine can find
// its way through.
#pragma once

#include "cuda/attention/hopper.cuh"

namespace tilewise {

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

// Packed rows, as maps have them: twice, by their second dimension and, one more, by their last,
// from an address on that is `rows` rows too low. Row i of a sequence of `count` rows from `first`
// on is at {rows - count + i, first + count}, together `rows` too many, and the second dimension
// ends where the sequence does: beyond it the copy engine has zeros and writes nothing. An address
// is only computed for what is inside of all dimensions, so nothing but rows is ever touched.
template <typename T>
Heads<T> in_sequences(const Heads<T>& x, int64_t rows, int64_t dim) {
  const int64_t row = rows > 1 ? x.row : dim;
  const auto base = reinterpret_cast<uintptr_t>(x.at) - static_cast<size_t>(rows * row) * sizeof(T);
  return {reinterpret_cast<T*>(base), row, x.head, row};
}

// Whether it can be so. Coordinates, of rows and as many more as a tile has, are ints, and sizes are
// at most 2^32; the address is positive, and as aligned as the tensor's and its strides are: where
// these are not by 16 bytes, is_scored() has said so.
template <typename T>
bool has_packed_map(const Heads<T>& x, int64_t heads, int64_t rows, int64_t dim) {
  if (rows <= 0 || rows > kMostPositions || !has_map(x, 1, heads, rows)) return false;
  const auto skipped = static_cast<uint64_t>(rows) * (rows > 1 ? x.row : dim) * sizeof(T);
  return reinterpret_cast<uintptr_t>(x.at) > skipped;
}

}  // namespace tilewise
