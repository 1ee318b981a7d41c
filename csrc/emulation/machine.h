// What the emulated machine is made of: only for the files of this folder that are compiled into
// the runtime.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/runtime.h"
#include "emulation/trace.h"

namespace tilewise::emulation {

struct Block;

// What a thread waits for, for the report.
struct Wait {
  const char* what = "";
  Place place{};
  unsigned mask = 0;  // of a warp's meeting
  int id = -1;        // of a named barrier
  int threads = 0;    // that it wants
};

// Of a thread that may be spinning: the addresses it read since it last did anything else.
struct Reads {
  const void* at[4] = {};
  unsigned next = 0;   // of them to be forgotten
  unsigned again = 0;  // reads since another address came
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int rank = 0;
  bool returned = false;
  Wait wait;
  bool (*ready)(void*) = nullptr;  // where it waits for a condition
  void* argument = nullptr;
  bool fenced = false;        // executed __threadfence, and
  bool fenced_block = false;  // __threadfence_block
  const void* last_atomic = nullptr;
  Reads reads;
};

struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;  // its parity names the barrier to ThreadSanitizer
  int count[2] = {};        // of true predicates
  Place place{};            // of who came first
  std::vector<Thread*> waiting;
};

// Lanes of a warp that execute the same instruction with the same mask.
struct Meeting {
  unsigned mask = 0;  // 0: free
  unsigned arrived = 0;
  unsigned inside = 0;  // complete, and these have not yet read
  bool complete = false;
  const char* what = "";
  Place place{};
  uint64_t values[kLanes];
};

struct Warp {
  unsigned alive = 0;
  Meeting meetings[kLanes + 1];
};

struct SharedArray {
  const void* key;
  const char* name;
  size_t offset, bytes;
};

constexpr size_t kArenaBytes = 512 * 1024;  // of addresses, for the shared memory of a block

// The shared memory of one block, between two pages that nobody may touch.
struct SharedMemory {
  ~SharedMemory();
  char* base = nullptr;
  char* written = nullptr;    // what is known of each byte: written.h
  char* published = nullptr;  // and of each as the copy engine and wgmma see it
  size_t used = 0;
  std::vector<SharedArray> arrays;
};

struct Block {
  uint3 index{};
  unsigned cluster_rank = 0;
  int alive = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  SharedMemory shared;
  void* tags = nullptr;  // addresses that name this block's barriers to ThreadSanitizer
};

enum class Order { kForward, kReverse, kRandom };

struct Machine {
  Shape shape;
  const void* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;  // resident together
  Stacks stacks;
  std::vector<Thread*> ready;
  size_t next = 0;  // in ready
  std::vector<Thread*> polling;
  int alive = 0;
  uint64_t turns = 0;       // of all threads, since the launch began
  uint64_t spins = 0;       // preemptions since a thread last waited or returned
  uint64_t idle_turns = 0;  // that ended because a thread spins, since anything was written
  Order order = Order::kForward;
  uint64_t random = 0;
  uint64_t skew = 0;          // in a random order, what makes some warps slow; 0: none is
  Thread* current = nullptr;  // that runs, or whose condition is asked
  bool on_fiber = false;
  char failure[2048] = "";  // the first line of the report
  Place failed_at{};        // or, without a file, where this leads
  Trace failed_in;
};

extern Machine machine;

// --- scheduler.cpp

void suspend(const Wait& wait);  // until somebody makes this thread ready
void make_ready(Thread* thread);
bool poll();  // make ready whoever waits for what has come true; whether there is anybody
uint64_t draw();

// As fail(), of code that has no place but this one.
[[noreturn]] void fail_in(const Trace& trace, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// --- warp.cpp

// A lane returned: those that wait for it need not any longer.
void leave_warp(Thread& thread);

// --- memory.cpp

void prepare_shared(Block& block, size_t dynamic_bytes);
void check_shared(const Block& block);
// Addresses that stand for this block's i-th synchronisation object.
const void* tag(const Block& block, int i);

// --- report.cpp

// In which kernel, and for a thread in which thread of which block.
std::string whereabouts(const Thread* thread);
std::string describe_deadlock();
std::string kernel_name(const void* kernel);
bool same(Place a, Place b);

}  // namespace tilewise::emulation
