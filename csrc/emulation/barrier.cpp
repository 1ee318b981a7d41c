// Barriers of a block: __syncthreads is number 0 of the named ones.
#include "emulation/machine.h"

namespace tilewise::emulation {
namespace {

// Both generations that can be under way have an address each.
const void* generation_tag(const Block& block, int id, unsigned generation) {
  return tag(block, id * 2 + (generation & 1));
}

// Count the thread in; whether it was the last, in which case all others go on.
bool arrive(Barrier& barrier, int id, int threads) {
  Block& block = *machine.current->block;
  release(generation_tag(block, id, barrier.generation));
  barrier.expected = threads;
  if (++barrier.arrived < threads) return false;
  ++barrier.generation;
  barrier.arrived = 0;
  barrier.count[barrier.generation & 1] = 0;
  for (Thread* thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
  return true;
}

void wait(Barrier& barrier, int id, const Wait& reason) {
  const unsigned generation = barrier.generation;
  if (!arrive(barrier, id, reason.threads)) {
    barrier.waiting.push_back(machine.current);
    suspend(reason);
  }
  acquire(generation_tag(*machine.current->block, id, generation));
}

Barrier& named(int id, int threads, const char* what, Place place) {
  if (id < 0 || id >= kNamedBarriers) {
    fail(place, "%s: the barrier must be 0 to %d, got %d", what, kNamedBarriers - 1, id);
  }
  Block& block = *machine.current->block;
  const int all = static_cast<int>(block.threads.size());
  if (threads <= 0 || threads % kLanes != 0 || threads > (all + kLanes - 1) / kLanes * kLanes) {
    fail(place, "%s: the count must be a multiple of %d and at most the block, got %d of %d", what,
         kLanes, threads, all);
  }
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (barrier.expected != threads) {
    fail(place, "%s: barrier %d is asked for %d threads, and at %s:%d for %d", what, id, threads,
         barrier.place.file, barrier.place.line, barrier.expected);
  }
  return barrier;
}

}  // namespace

int sync_block_count(bool predicate, const char* what, Place place) {
  Block& block = *machine.current->block;
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!same(barrier.place, place)) {
    fail(place, "%s: divergent, %d of %d threads wait for the others at %s:%d (%s)", what,
         barrier.arrived, static_cast<int>(block.threads.size()), barrier.place.file,
         barrier.place.line, barrier.place.function);
  }
  const unsigned generation = barrier.generation;
  barrier.count[generation & 1] += predicate;
  wait(barrier, 0, {what, place, 0, -1, static_cast<int>(block.threads.size())});
  return barrier.count[generation & 1];
}

void sync_block(const char* what, Place place) { sync_block_count(false, what, place); }

void sync_named(int id, int threads, const char* what, Place place) {
  wait(named(id, threads, what, place), id, {what, place, 0, id, threads});
}

void arrive_named(int id, int threads, const char* what, Place place) {
  arrive(named(id, threads, what, place), id, threads);
}

}  // namespace tilewise::emulation
