// What the code of kernels calls in the build "memory": it is compiled as for ThreadSanitizer,
// whose library is not linked, and every access comes here instead. A read of what nobody wrote
// fails; a thread that reads the same few addresses again and again lets others run. The host's
// code of the same files calls these too: what it writes to the memory of the device counts as
// written.
#if defined(TILEWISE_MEMORY)
#include <cstdint>

#include "emulation/machine.h"
#include "emulation/written.h"

#define TILEWISE_CALLBACK extern "C" __attribute__((visibility("hidden")))
// Where the access is: the function that calls must not be inlined.
#define TILEWISE_HERE __builtin_return_address(0), __builtin_frame_address(0)

namespace tilewise::emulation {
namespace {

constexpr unsigned kReads = 1000;         // of the same addresses, after which others run
constexpr uint64_t kMinIdleTurns = 4096;  // after which nobody will ever do anything else
constexpr uint64_t kIdleTurnsEach = 64;   // or, where many spin, this for each

const void* before(const void* return_address) {
  return static_cast<const char*>(return_address) - 1;
}

bool is_own_stack(const Thread& me, const void* at) {
  return static_cast<size_t>(static_cast<const char*>(at) - me.fiber.stack) < kStackBytes;
}

__attribute__((noinline, cold)) void report(const Unwritten& found, size_t bytes, const void* here,
                                            const void* frame) {
  char text[256];
  name(found.at, text);
  fail_in(trace_from(before(here), frame), "uninitialised memory: reads %zu bytes, and %s %s",
          bytes, text, describe(found.how));
}

__attribute__((noinline, cold)) void give_way(const void* here, const void* frame) {
  const uint64_t all = machine.alive;
  const uint64_t patience =
      kIdleTurnsEach * all > kMinIdleTurns ? kIdleTurnsEach * all : kMinIdleTurns;
  if (++machine.idle_turns > patience) {
    fail_in(trace_from(before(here), frame),
            "spins: reads the same again and again, and nothing else happens");
  }
  preempt("a loop", Place::here());
}

void read(const void* at, size_t bytes, const void* here, const void* frame) {
  if (!machine.on_fiber) return;
  Thread& me = *machine.current;
  if (is_own_stack(me, at)) return;
  if (const Unwritten found = first_unwritten(at, bytes); found.at) {
    report(found, bytes, here, frame);
  }
  Reads& reads = me.reads;
  for (const void* known : reads.at) {
    if (known != at) continue;
    if (++reads.again < kReads) return;
    reads.again = 0;
    return give_way(here, frame);
  }
  reads.at[reads.next++ % 4] = at;
  reads.again = 0;
}

void write(const void* at, size_t bytes) {
  if (machine.on_fiber) {
    if (is_own_stack(*machine.current, at)) return;
    machine.current->reads.again = 0;
    machine.idle_turns = 0;
  }
  mark(at, bytes, Written::yes);
}

// Atomics of kernels are checked by before_atomic; here they only write.
template <typename T, typename Change>
T change(volatile T* at, Change wanted) {
  T before = __atomic_load_n(at, __ATOMIC_SEQ_CST), after;
  do {
    after = wanted(before);
  } while (
      !__atomic_compare_exchange_n(at, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  if (after != before) {
    write(const_cast<const T*>(at), sizeof(T));
  } else {
    mark(const_cast<const T*>(at), sizeof(T), Written::yes);
  }
  return before;
}

}  // namespace
}  // namespace tilewise::emulation

using namespace tilewise::emulation;

#define TILEWISE_ACCESS(bytes)                                                                     \
  TILEWISE_CALLBACK void __tsan_read##bytes(void* at) { read(at, bytes, TILEWISE_HERE); }          \
  TILEWISE_CALLBACK void __tsan_write##bytes(void* at) { write(at, bytes); }                       \
  TILEWISE_CALLBACK void __tsan_volatile_read##bytes(void* at) { read(at, bytes, TILEWISE_HERE); } \
  TILEWISE_CALLBACK void __tsan_volatile_write##bytes(void* at) { write(at, bytes); }              \
  TILEWISE_CALLBACK void __tsan_read_write##bytes(void* at) {                                      \
    read(at, bytes, TILEWISE_HERE);                                                                \
    write(at, bytes);                                                                              \
  }
#define TILEWISE_UNALIGNED(bytes)                                                               \
  TILEWISE_CALLBACK void __tsan_unaligned_read##bytes(void* at) {                               \
    read(at, bytes, TILEWISE_HERE);                                                             \
  }                                                                                             \
  TILEWISE_CALLBACK void __tsan_unaligned_write##bytes(void* at) { write(at, bytes); }          \
  TILEWISE_CALLBACK void __tsan_unaligned_volatile_read##bytes(void* at) {                      \
    read(at, bytes, TILEWISE_HERE);                                                             \
  }                                                                                             \
  TILEWISE_CALLBACK void __tsan_unaligned_volatile_write##bytes(void* at) { write(at, bytes); } \
  TILEWISE_CALLBACK void __tsan_unaligned_read_write##bytes(void* at) {                         \
    read(at, bytes, TILEWISE_HERE);                                                             \
    write(at, bytes);                                                                           \
  }

TILEWISE_ACCESS(1)
TILEWISE_ACCESS(2)
TILEWISE_ACCESS(4)
TILEWISE_ACCESS(8)
TILEWISE_ACCESS(16)
TILEWISE_UNALIGNED(2)
TILEWISE_UNALIGNED(4)
TILEWISE_UNALIGNED(8)
TILEWISE_UNALIGNED(16)

TILEWISE_CALLBACK void __tsan_read_range(void* at, unsigned long bytes) {
  read(at, bytes, TILEWISE_HERE);
}
TILEWISE_CALLBACK void __tsan_write_range(void* at, unsigned long bytes) { write(at, bytes); }

TILEWISE_CALLBACK void __tsan_init() {}
TILEWISE_CALLBACK void __tsan_func_entry(void*) {}
TILEWISE_CALLBACK void __tsan_func_exit() {}
TILEWISE_CALLBACK void __tsan_vptr_update(void**, void*) {}
TILEWISE_CALLBACK void __tsan_vptr_read(void**) {}

// --- Calls of the C library that are left in the code: --wrap leads them here.

extern "C" void* __real_memcpy(void*, const void*, size_t);
extern "C" void* __real_memmove(void*, const void*, size_t);
extern "C" void* __real_memset(void*, int, size_t);

#define TILEWISE_COPY(name, real)                                          \
  TILEWISE_CALLBACK void* name(void* to, const void* from, size_t bytes) { \
    read(from, bytes, TILEWISE_HERE);                                      \
    write(to, bytes);                                                      \
    return real(to, from, bytes);                                          \
  }
#define TILEWISE_SET(name)                                         \
  TILEWISE_CALLBACK void* name(void* at, int byte, size_t bytes) { \
    write(at, bytes);                                              \
    return __real_memset(at, byte, bytes);                         \
  }

TILEWISE_COPY(__wrap_memcpy, __real_memcpy)
TILEWISE_COPY(__wrap_memmove, __real_memmove)
TILEWISE_SET(__wrap_memset)
TILEWISE_COPY(__tsan_memcpy, __real_memcpy)  // by newer versions of clang++
TILEWISE_COPY(__tsan_memmove, __real_memmove)
TILEWISE_SET(__tsan_memset)

// --- Atomics, of atomic.h and of the host's code.

#define TILEWISE_FETCH(bits, name, expression)                                               \
  TILEWISE_CALLBACK uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* at, \
                                                                uint##bits##_t v, int) {     \
    using Word = uint##bits##_t;                                                             \
    return change(at, [v](Word old) {                                                        \
      static_cast<void>(old);                                                                \
      return static_cast<Word>(expression);                                                  \
    });                                                                                      \
  }
#define TILEWISE_COMPARE(bits, name)                                                       \
  TILEWISE_CALLBACK int __tsan_atomic##bits##_compare_exchange_##name(                     \
      volatile uint##bits##_t* at, uint##bits##_t* expected, uint##bits##_t v, int, int) { \
    const uint##bits##_t wanted = *expected;                                               \
    *expected = change(at, [=](uint##bits##_t old) { return old == wanted ? v : old; });   \
    return *expected == wanted;                                                            \
  }
#define TILEWISE_ATOMICS(bits)                                                                   \
  TILEWISE_CALLBACK uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* at, \
                                                              int) {                             \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                \
  }                                                                                              \
  TILEWISE_CALLBACK void __tsan_atomic##bits##_store(volatile uint##bits##_t* at,                \
                                                     uint##bits##_t v, int) {                    \
    change(at, [v](uint##bits##_t) { return v; });                                               \
  }                                                                                              \
  TILEWISE_FETCH(bits, exchange, v)                                                              \
  TILEWISE_FETCH(bits, fetch_add, old + v)                                                       \
  TILEWISE_FETCH(bits, fetch_sub, old - v)                                                       \
  TILEWISE_FETCH(bits, fetch_and, old& v)                                                        \
  TILEWISE_FETCH(bits, fetch_or, old | v)                                                        \
  TILEWISE_FETCH(bits, fetch_xor, old ^ v)                                                       \
  TILEWISE_FETCH(bits, fetch_nand, ~(old & v))                                                   \
  TILEWISE_COMPARE(bits, strong)                                                                 \
  TILEWISE_COMPARE(bits, weak)

TILEWISE_ATOMICS(8)
TILEWISE_ATOMICS(16)
TILEWISE_ATOMICS(32)
TILEWISE_ATOMICS(64)

TILEWISE_CALLBACK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
TILEWISE_CALLBACK void __tsan_atomic_signal_fence(int) {}
#endif
