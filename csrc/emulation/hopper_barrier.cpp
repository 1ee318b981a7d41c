// mbarrier: a word in shared memory that counts arrivals and bytes.
#include "emulation/hopper.h"
#include "emulation/late.h"
#include "emulation/written.h"

namespace tilewise::emulation {
namespace {

constexpr unsigned kMark = 1;  // poisoned memory has 3
constexpr uint32_t kMaxCount = (1 << 20) - 1;

struct State {
  uint64_t mark : 2;
  uint64_t phase : 1;
  uint64_t expected : 20;  // arrivals of each phase
  uint64_t pending : 20;   // of this one
  int64_t bytes : 21;      // that are still to come, or came before they were expected
};
static_assert(sizeof(State) == sizeof(uint64_t));

// Without memcpy on memory of the kernel.
State read(const uint64_t* barrier) {
  State state;
  const uint64_t word = *barrier;
  __builtin_memcpy(&state, &word, sizeof state);
  return state;
}

void write(uint64_t* barrier, const State& state) {
  uint64_t word;
  __builtin_memcpy(&word, &state, sizeof word);
  *barrier = word;
}

void check_address(const uint64_t* barrier, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t)) {
    fail(place, "%s: a barrier must be 8-byte aligned, got %p", what,
         static_cast<const void*>(barrier));
  }
  const int rank = shared_rank(barrier);
  if (rank < 0) {
    fail(place, "%s: a barrier must be in shared memory, got %p", what,
         static_cast<const void*>(barrier));
  }
}

State checked(const uint64_t* barrier, const char* what, Place place) {
  check_address(barrier, what, place);
  const State state = read(barrier);
  if (state.mark != kMark || state.expected == 0 || state.pending > state.expected) {
    fail(place, "%s: the barrier was never initialised, or overwritten", what);
  }
  return state;
}

bool end_phase_if_complete(State& state) {
  if (state.pending || state.bytes) return false;
  state.phase ^= 1;
  state.pending = state.expected;
  return true;
}

// Count an arrival, and bytes to wait for. Who can go on because of it runs before this thread
// does: what it arrived too early for is then overwritten.
void arrive(uint64_t* barrier, uint32_t bytes, const char* what, Place place) {
  State state = checked(barrier, what, place);
  if (state.pending == 0) {
    fail(place, "%s: more than the %u arrivals of a phase, whose bytes have not all come", what,
         static_cast<unsigned>(state.expected));
  }
  if (bytes > kMaxCount) fail(place, "%s: at most %u bytes, got %u", what, kMaxCount, bytes);
  release(barrier_tag(barrier));
  state.bytes += bytes;
  --state.pending;
  const bool is_over = end_phase_if_complete(state);
  write(barrier, state);
  if (!is_over) return;
  poll();
  preempt(what, place);
}

struct Awaited {
  uint64_t* barrier;
  uint32_t parity;
};

bool is_over(void* argument) {
  const auto* awaited = static_cast<const Awaited*>(argument);
  return read(awaited->barrier).phase != awaited->parity;
}

void wait(uint64_t* barrier, uint32_t parity, const char* what, Place place) {
  checked(barrier, what, place);
  if (parity > 1) fail(place, "%s: a parity must be 0 or 1, got %u", what, parity);
  if (shared_rank(barrier) != static_cast<int>(cluster_rank())) {
    fail(place, "%s: a thread can only wait for a barrier of its own block", what);
  }
  Awaited awaited{barrier, parity};
  wait_until(is_over, &awaited, what, place);
  acquire(reinterpret_cast<const char*>(barrier) + parity);
}

}  // namespace

const void* barrier_tag(const uint64_t* barrier) {
  return reinterpret_cast<const char*>(barrier) + read(barrier).phase;
}

void check_barrier(const uint64_t* barrier, const char* what, Place place) {
  checked(barrier, what, place);
}

void barrier_complete(uint64_t* barrier, uint32_t bytes, const char* what, Place place) {
  State state = read(barrier);
  if (state.mark != kMark) fail(place, "%s: its barrier was overwritten meanwhile", what);
  state.bytes -= bytes;
  if (state.pending == 0 && state.bytes < 0) {
    fail(place, "%s: %d bytes more came to the barrier than its phase expects", what,
         static_cast<int>(-state.bytes));
  }
  end_phase_if_complete(state);
  write(barrier, state);
}

}  // namespace tilewise::emulation

namespace tilewise {

using emulation::Place;

using emulation::fail;

void barrier_init(uint64_t* barrier, uint32_t arrivals, Place place) {
  constexpr const char* kWhat = "mbarrier.init";
  emulation::check_address(barrier, kWhat, place);
  if (arrivals == 0 || arrivals > emulation::kMaxCount) {
    fail(place, "%s: 1 to %u arrivals, got %u", kWhat, emulation::kMaxCount, arrivals);
  }
  const emulation::State old = emulation::read(barrier);
  if (old.mark == emulation::kMark && old.expected && old.pending != old.expected) {
    fail(place, "%s: a phase of this barrier is under way", kWhat);
  }
  emulation::write(barrier, {emulation::kMark, 0, arrivals, arrivals, 0});
  emulation::mark(barrier, sizeof *barrier, emulation::Written::yes);
}

void barrier_init_fence() {}

void barrier_arrive(uint64_t* barrier, Place place) {
  emulation::arrive(barrier, 0, "mbarrier.arrive", place);
}

void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Place place) {
  emulation::arrive(barrier, bytes, "mbarrier.arrive.expect_tx", place);
}

void barrier_arrive_remote(uint64_t* barrier, uint32_t rank, Place place) {
  emulation::arrive(peer(barrier, rank, place), 0, "mbarrier.arrive.shared::cluster", place);
}

bool barrier_try_wait(uint64_t* barrier, uint32_t parity, Place place) {
  constexpr const char* kWhat = "mbarrier.try_wait";
  emulation::checked(barrier, kWhat, place);
  if (emulation::read(barrier).phase == parity) emulation::preempt(kWhat, place);
  if (emulation::read(barrier).phase == parity) return false;
  emulation::acquire(reinterpret_cast<const char*>(barrier) + parity);
  return true;
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Place place) {
  emulation::wait(barrier, parity, "mbarrier.try_wait", place);
}

void barrier_wait_cluster(uint64_t* barrier, uint32_t parity, Place place) {
  emulation::wait(barrier, parity, "mbarrier.try_wait.cluster", place);
}

}  // namespace tilewise
