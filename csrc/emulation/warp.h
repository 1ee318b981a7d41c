// Barriers, and what the lanes of a warp do together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/runtime.h"

namespace tilewise::emulation {

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// The value that lane `source` brought, or one's own where `source` is outside of the group.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool inside, const char* what, Place place) {
  uint64_t values[kLanes];
  const unsigned came = exchange(mask, to_word(value), values, false, what, place);
  if (!inside) return value;
  if (!(came >> source & 1)) {
    fail(place, "%s: lane %d reads lane %d, which is not in the mask %08x or has returned", what,
         lane(), source, mask);
  }
  return from_word<T>(values[source]);
}

inline int group_begin(int width) { return lane() & ~(width - 1); }

// Fold the values of the lanes that came.
template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine, const char* what, Place place) {
  uint64_t values[kLanes];
  unsigned came = exchange(mask, to_word(value), values, false, what, place);
  T result = from_word<T>(values[__builtin_ctz(came)]);
  for (came &= came - 1; came; came &= came - 1) {
    result = combine(result, from_word<T>(values[__builtin_ctz(came)]));
  }
  return result;
}

}  // namespace tilewise::emulation

// --- Barriers.

inline void __syncthreads(tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  tilewise::emulation::sync_block("__syncthreads", place);
}

inline int __syncthreads_count(
    int predicate, tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  return tilewise::emulation::sync_block_count(predicate != 0, "__syncthreads_count", place);
}

inline int __syncthreads_or(int predicate,
                            tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  return tilewise::emulation::sync_block_count(predicate != 0, "__syncthreads_or", place) != 0;
}

inline int __syncthreads_and(
    int predicate, tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  return tilewise::emulation::sync_block_count(predicate == 0, "__syncthreads_and", place) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  uint64_t values[tilewise::emulation::kLanes];
  tilewise::emulation::exchange(mask, 0, values, true, "__syncwarp", place);
}

inline void __threadfence() { tilewise::emulation::fence(false); }
inline void __threadfence_system() { tilewise::emulation::fence(false); }
inline void __threadfence_block() { tilewise::emulation::fence(true); }

inline void __nanosleep(unsigned,
                        tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  tilewise::emulation::preempt("__nanosleep", place);
}

// --- Shuffles.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  return shuffle(mask, value, group_begin(width) | (source & (width - 1)), true, "__shfl_sync",
                 place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  const int source = lane() ^ flip;  // of a group that comes later there is no value
  return shuffle(mask, value, source, source < group_begin(width) + width, "__shfl_xor_sync",
                 place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  const int source = lane() + static_cast<int>(distance);
  return shuffle(mask, value, source, source < group_begin(width) + width, "__shfl_down_sync",
                 place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  const int source = lane() - static_cast<int>(distance);
  return shuffle(mask, value, source, source >= group_begin(width), "__shfl_up_sync", place);
}

// --- Votes, matches, reductions.

inline unsigned __activemask() { return tilewise::emulation::active_lanes(); }

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  const unsigned mine = predicate ? 1u << tilewise::emulation::lane() : 0;
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return tilewise::emulation::reduce(mask, mine, either, "__ballot_sync", place);
}

inline int __any_sync(unsigned mask, int predicate,
                      tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  const auto either = [](bool a, bool b) { return a || b; };
  return tilewise::emulation::reduce(mask, predicate != 0, either, "__any_sync", place);
}

inline int __all_sync(unsigned mask, int predicate,
                      tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  const auto both = [](bool a, bool b) { return a && b; };
  return tilewise::emulation::reduce(mask, predicate != 0, both, "__all_sync", place);
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  uint64_t values[kLanes];
  const unsigned came = exchange(mask, to_word(value), values, false, "__match_any_sync", place);
  unsigned same = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (came >> i & 1 && values[i] == to_word(value)) same |= 1u << i;
  }
  return same;
}

template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all,
                          tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  using namespace tilewise::emulation;
  uint64_t values[kLanes];
  const unsigned came = exchange(mask, to_word(value), values, false, "__match_all_sync", place);
  for (int i = 0; i < kLanes; ++i) {
    if (came >> i & 1 && values[i] != to_word(value)) {
      *all = 0;
      return 0;
    }
  }
  *all = 1;
  return mask;
}

#define TILEWISE_REDUCE(name, type, expression)                                             \
  inline type name(unsigned mask, type value,                                               \
                   tilewise::emulation::Place place = tilewise::emulation::Place::here()) { \
    const auto combine = [](type a, type b) -> type { return expression; };                 \
    return tilewise::emulation::reduce(mask, value, combine, #name, place);                 \
  }

TILEWISE_REDUCE(__reduce_add_sync, unsigned, a + b)
TILEWISE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
TILEWISE_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
TILEWISE_REDUCE(__reduce_and_sync, unsigned, a& b)
TILEWISE_REDUCE(__reduce_or_sync, unsigned, a | b)
TILEWISE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
TILEWISE_REDUCE(__reduce_add_sync, int,
                static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
TILEWISE_REDUCE(__reduce_min_sync, int, a < b ? a : b)
TILEWISE_REDUCE(__reduce_max_sync, int, a > b ? a : b)

#undef TILEWISE_REDUCE
