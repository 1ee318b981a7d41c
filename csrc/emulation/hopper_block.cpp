// Clusters, and the registers that warpgroups hand to each other.
#include <algorithm>

#include "emulation/hopper.h"
#include "emulation/late.h"
#include "emulation/written.h"

namespace tilewise::emulation {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kMaxClusterThreads = 16 * kMaxBlockThreads;
constexpr int kFileRegisters = 65536;  // of a multiprocessor

// The barrier that all threads of a cluster have in common. A thread that returned has arrived.
struct ClusterBarrier {
  unsigned generation;
  int arrived;
  unsigned arrived_for[kMaxClusterThreads];  // this generation + 1, 0 after the wait
};

ClusterBarrier barrier;

struct Pool {
  int free;                                    // registers that were released and not yet claimed
  int each[kMaxBlockThreads / kWarpgroup];     // of a warpgroup's threads; 0: not yet known
  int threads[kMaxBlockThreads / kWarpgroup];  // that executed the last change
};

Pool pools[16];

void forget_block() {
  barrier.generation = 0;
  barrier.arrived = 0;
  for (unsigned& generation : barrier.arrived_for) generation = 0;
  for (Pool& pool : pools) pool = Pool{};
}

// A block has ended and others of its cluster have not: what they read there is no longer defined.
void close_shared(const Block& block) {
  if (machine.blocks.size() <= 1) return;
  poison_bytes(block.shared.base, block.shared.used);
  mark_in(block, 0, block.shared.used, Written::block_ended);
}

const bool registered = (on_residence(forget_block), on_end(close_shared), true);

int cluster_thread(const Thread& thread) {
  return static_cast<int>(thread.block->cluster_rank) * kMaxBlockThreads + thread.rank;
}

// Names a generation to ThreadSanitizer.
const void* cluster_tag(unsigned generation) {
  constexpr int kFirstTag = 8000;  // after those of a block
  return tag(*machine.blocks[0], kFirstTag + static_cast<int>(generation & 1));
}

bool all_arrived() {
  if (barrier.arrived < machine.alive) return false;
  for (const auto& block : machine.blocks) {
    for (const Thread& thread : block->threads) {
      const bool came = barrier.arrived_for[cluster_thread(thread)] == barrier.generation + 1;
      if (!came && !thread.returned) return false;
    }
  }
  return true;
}

bool cluster_has_met(void* argument) {
  if (barrier.generation != *static_cast<unsigned*>(argument)) return true;
  if (!all_arrived()) return false;
  ++barrier.generation;
  barrier.arrived = 0;
  return true;
}

// True when asked for the second time, which is when nobody else could run.
bool asked_again(void* argument) { return ++*static_cast<int*>(argument) > 1; }

}  // namespace

void* peer(void* pointer, uint32_t rank, Place place) {
  const uint32_t offset = shared_offset(pointer, place);
  if (rank >= cluster_blocks()) {
    fail(place, "mapa: the rank must be below the cluster's %u, got %u", cluster_blocks(), rank);
  }
  if (rank == cluster_rank()) return pointer;
  // Either at once, which finds what the peer has not written yet, or when others have gone on as
  // far as they can, which finds what is no longer there.
  const bool late =
      machine.order == Order::kForward || (machine.order == Order::kRandom && draw() % 2);
  int asked = 0;
  if (late) wait_until(asked_again, &asked, "mapa", place);
  if (machine.blocks[rank]->alive == 0) {
    fail(place, "mapa: block %u of the cluster has ended, and its shared memory with it", rank);
  }
  return shared_base(rank) + offset;
}

void change_registers(int registers, bool claim, Place place) {
  const Thread& me = *machine.current;
  const char* what = claim ? "setmaxnreg.inc" : "setmaxnreg.dec";
  const int all = static_cast<int>(me.block->threads.size());
  const int group = me.rank / kWarpgroup;
  if (all < (group + 1) * kWarpgroup) fail(place, "%s: needs a whole warpgroup", what);
  Pool& pool = pools[me.block->cluster_rank];
  int& each = pool.each[group];
  // What a kernel bounded to this many threads, one block on a multiprocessor, begins with.
  if (each == 0) each = std::min(kFileRegisters / all / 8 * 8, 248);
  if (pool.threads[group]++ % kWarpgroup) {  // counted when the first thread came
    if (each != registers) fail(place, "%s: threads of a warpgroup disagree", what);
    return;
  }
  if (claim ? registers < each : registers > each) {
    fail(place, "%s: the warpgroup has %d registers, got %d", what, each, registers);
  }
  struct Need {
    Pool* pool;
    int registers;
  } need{&pool, (registers - each) * kWarpgroup};
  each = registers;
  wait_until(
      [](void* argument) {
        auto* need = static_cast<Need*>(argument);
        if (need->pool->free < need->registers) return false;
        need->pool->free -= need->registers;
        need->registers = 0;
        return true;
      },
      &need, what, place);
}

}  // namespace tilewise::emulation

namespace tilewise {

using emulation::Place;

void cluster_arrive(Place place) {
  using namespace emulation;
  unsigned& mine = barrier.arrived_for[cluster_thread(*machine.current)];
  if (mine) fail(place, "barrier.cluster.arrive: a second time without a wait");
  mine = barrier.generation + 1;
  ++barrier.arrived;
  release(cluster_tag(barrier.generation));
}

void cluster_wait(Place place) {
  using namespace emulation;
  unsigned& mine = barrier.arrived_for[cluster_thread(*machine.current)];
  if (!mine) fail(place, "barrier.cluster.wait: without an arrive");
  unsigned generation = mine - 1;
  wait_until(cluster_has_met, &generation, "barrier.cluster.wait", place);
  mine = 0;
  acquire(cluster_tag(generation));
}

}  // namespace tilewise
