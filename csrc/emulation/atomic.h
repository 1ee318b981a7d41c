// Atomic operations: relaxed, as on a GPU. A failed or a repeated one lets other threads run, for
// the thread may be waiting for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/runtime.h"
#include "emulation/warp.h"

namespace tilewise::emulation {

template <typename T>
using WordOf =
    std::conditional_t<sizeof(T) == 8, uint64_t,
                       std::conditional_t<sizeof(T) == 4, uint32_t,
                                          std::conditional_t<sizeof(T) == 2, uint16_t, void>>>;

// Replace *address by change(*address) and return what was there. Not kReads: whatever was there.
template <bool kReads, typename T, typename Change>
T atomic(T* address, Change change, const char* what, Place place) {
  using Word = WordOf<T>;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fail(place, "%s: the address must be a multiple of %d, got %p", what,
         static_cast<int>(sizeof(T)), static_cast<const void*>(address));
  }
  auto word = reinterpret_cast<Word*>(address);
  before_atomic(address, kReads ? sizeof(T) : 0, what, place);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    const T changed = change(from_word<T>(before));
    after = static_cast<Word>(to_word(changed));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  after_atomic(address);
  if (after == before) preempt(what, place);  // it may spin
  return from_word<T>(before);
}

}  // namespace tilewise::emulation

// The other argument has the type of the memory, converted as in a call of a function.
#define TILEWISE_ATOMIC(name, reads, expression)                                  \
  template <typename T>                                                           \
  T name(T* address, std::common_type_t<T> v,                                     \
         tilewise::emulation::Place place = tilewise::emulation::Place::here()) { \
    const auto change = [v](T old) -> T { return expression; };                   \
    return tilewise::emulation::atomic<reads>(address, change, #name, place);     \
  }

TILEWISE_ATOMIC(atomicAdd, true, old + v)
TILEWISE_ATOMIC(atomicSub, true, old - v)
TILEWISE_ATOMIC(atomicMin, true, v < old ? v : old)
TILEWISE_ATOMIC(atomicMax, true, old < v ? v : old)
TILEWISE_ATOMIC(atomicExch, false, (static_cast<void>(old), v))
TILEWISE_ATOMIC(atomicAnd, true, old& v)
TILEWISE_ATOMIC(atomicOr, true, old | v)
TILEWISE_ATOMIC(atomicXor, true, old ^ v)
TILEWISE_ATOMIC(atomicInc, true, old >= v ? 0 : old + 1)
TILEWISE_ATOMIC(atomicDec, true, old == 0 || old > v ? v : old - 1)

#undef TILEWISE_ATOMIC

template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> v,
            tilewise::emulation::Place place = tilewise::emulation::Place::here()) {
  const auto change = [expected, v](T old) -> T { return old == expected ? v : old; };
  return tilewise::emulation::atomic<true>(address, change, "atomicCAS", place);
}
