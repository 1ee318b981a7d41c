// The columns of a row that a thread works on: accesses of kWidth columns, thread after thread of
// its team. It holds kHeld of them in registers, so that a row is read once from memory; a row that
// is longer than its team can hold is gone through in chunks, and read again by every pass.
//
// kExact: all rows begin 16-byte aligned and are whole accesses long. Elsewhere the first access
// begins up to kWidth - 1 columns before the row, so that what follows is aligned, and the last may
// end behind it; what is outside of the row is read as zero and not written. Of several arrays not
// all may be aligned at the same column: those that are not are moved one element at a time.
#pragma once

#include "cuda/team.cuh"
#include "cuda/vector.cuh"

namespace tilewise {

template <int kWidth_, int kHeld_, bool kExact_>
class Span {
 public:
  static constexpr int kWidth = kWidth_, kHeld = kHeld_;
  static constexpr bool kExact = kExact_;
  using Column = std::conditional_t<kExact, int, int64_t>;

  // `head`: how many columns before the row the first access begins.
  template <typename Team>
  __device__ Span(int64_t cols, int head, const Team& team)
      : cols_(static_cast<Column>(cols)),
        first_(Column{team.index()} * kWidth - head),
        step_(Column{team.size()} * kWidth),
        chunks_(kExact ? 1 : static_cast<int>((cols + head - 1) / (kHeld * step_) + 1)) {}

  // Begin a row; a team without one has one of no columns.
  __device__ void begin(bool there) {
    limit_ = there ? cols_ : -kWidth;  // before any access
    fetched_ = false;
  }

  // Call fetch, which is to read the accesses of each() into registers, and body, which works on
  // them, for each chunk of the row. If there is one, it is fetched by the first pass only.
  template <typename Fetch, typename Body>
  __device__ void pass(Fetch fetch, Body body) {
    chunk_ = 0;
    do {
      if (!fetched_ || (!kExact && chunks_ > 1)) fetch();
      body();
    } while (!kExact && ++chunk_ < chunks_);
    fetched_ = true;
  }

  // Call body(k, col) for each access of this chunk: the k-th that is held, at column col.
  template <typename Body>
  __device__ void each(Body body) const {
    const Column begin = kExact ? first_ : first_ + chunk_ * kHeld * step_;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const Column col = begin + k * step_;
      if (col < limit_) body(k, col);
    }
  }

  // Which of the thread's accesses to the row this is.
  __device__ int access(int k) const { return kExact ? k : chunk_ * kHeld + k; }
  __device__ int accesses() const { return kExact ? kHeld : chunks_ * kHeld; }
  __device__ bool is_read_once() const { return kExact || chunks_ == 1; }

  // Whether element i of the access at a column is in the row.
  __device__ bool has(Column col, int i) const {
    return kExact || (col + i >= 0 && col + i < cols_);
  }

  template <typename T>
  __device__ Pack<T, kWidth> read(const T* row, Column col, bool once) const {
    if (is_wide(row, col)) return tilewise::read<kWidth>(row + col, once);
    Pack<T, kWidth> pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack.at[i] = has(col, i) ? row[col + i] : from_float<T>(0.f);
    return pack;
  }

  template <typename T>
  __device__ void write(T* row, Column col, const Pack<T, kWidth>& pack, bool once) const {
    if (is_wide(row, col)) return tilewise::write<kWidth>(row + col, pack, once);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (has(col, i)) row[col + i] = pack.at[i];
    }
  }

 private:
  template <typename T>
  __device__ bool is_wide(const T* row, Column col) const {
    return kExact || (col >= 0 && col + kWidth <= cols_ &&
                      reinterpret_cast<uintptr_t>(row + col) % alignof(Pack<T, kWidth>) == 0);
  }

  Column cols_, first_, step_, limit_ = cols_;
  int chunks_, chunk_ = 0;
  bool fetched_ = false;
};

// Where the rows of a [outer, middle, inner, cols] lie, in elements from the first.
struct Places {
  int64_t middle, inner;
  int64_t outer_stride, middle_stride, inner_stride;

  __device__ int64_t of(int64_t row) const {
    if (row < inner) return row * inner_stride;
    const int64_t before = row / inner, outer = before / middle;
    return outer * outer_stride + (before - outer * middle) * middle_stride +
           (row - before * inner) * inner_stride;
  }
};

// By how many columns an address is past the last aligned one.
template <typename T>
__device__ int misaligned_by(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kAccessBytes / sizeof(T));
}

// The accesses of a thread to one array: as they are in memory, two 16-bit numbers in a register.
template <typename T, typename Span>
class Held {
 public:
  __device__ void fetch(const Span& span, const T* row) {
    span.each([&](int k, auto col) { put(span.read(row, col, span.is_read_once()), k); });
  }

  __device__ void put(const Pack<T, Span::kWidth>& pack, int k) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words_[k][i] = reinterpret_cast<const uint32_t*>(&pack)[i];
    }
  }

  // The k-th access, as numbers.
  __device__ void get(float (&out)[Span::kWidth], int k) const {
    Pack<T, Span::kWidth> pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      uint32_t word = words_[k][i];
      forget(word);
      reinterpret_cast<uint32_t*>(&pack)[i] = word;
    }
    unpack(out, pack);
  }

 private:
  static constexpr int kWords = sizeof(Pack<T, Span::kWidth>) / sizeof(uint32_t);

  uint32_t words_[Span::kHeld][kWords];
};

}  // namespace tilewise
