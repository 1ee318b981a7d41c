// Where the tokens of sequences stand: each sequence in one piece, or in pages of a common pool.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tilewise {

// A page, or without pages a sequence, and which of its tokens; -1 is no page.
struct Slot {
  int page, token;
};

struct Cache {
  const int32_t* table;  // [batch, pages of a sequence], or null
  int64_t table_row;
  int64_t page_size, pages, capacity;

  __device__ Slot of(int batch, int64_t position) const {
    if (position < 0 || position >= capacity) return {-1, 0};
    const auto place = static_cast<uint32_t>(position);
    if (!table) return {batch, static_cast<int>(place)};
    const uint32_t size = static_cast<uint32_t>(page_size), number = place / size;
    const int page = table[batch * table_row + number];
    const bool known = page >= 0 && page < pages;
    return {known ? page : -1, static_cast<int>(place - number * size)};
  }
};

}  // namespace tilewise
