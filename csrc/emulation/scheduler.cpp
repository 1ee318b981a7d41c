// Who runs next. TILEWISE_EMULATION_ORDER says in which order blocks and threads take their turns:
// "forward" (the default), "reverse", or a number: the seed of a random order. By an odd seed some
// warps are slow: they hardly run while others can.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulation/machine.h"
#include "emulation/watchdog.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace tilewise::emulation {

Machine machine;

namespace {

constexpr uint64_t kMaxSpins = 1 << 22;  // while no thread waits or returns

std::mutex running;
thread_local std::string last_report;
// What other files register before main: made on first use, for files have no order.
struct Work {
  std::vector<bool (*)()> idle;
  std::vector<void (*)(const Block&)> end;
  std::vector<void (*)()> residence;
};

Work& work() {
  static Work registered;
  return registered;
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void read_order() {
  const char* asked = std::getenv("TILEWISE_EMULATION_ORDER");
  machine.order = Order::kForward;
  if (!asked || !*asked || !std::strcmp(asked, "forward")) return;
  char* end;
  machine.random = std::strtoull(asked, &end, 10) * 0x9E3779B97F4A7C15 + 1;
  if (!std::strcmp(asked, "reverse")) {
    machine.order = Order::kReverse;
  } else if (*end == '\0') {
    machine.order = Order::kRandom;
    machine.skew = machine.random & 1 ? 0 : draw();
  } else {
    throw Failure(std::string("TILEWISE_EMULATION_ORDER: must be forward, reverse or a number, "
                              "got ") +
                  asked);
  }
}

// What failed, and where.
std::string finding() {
  const Place place = machine.failed_at;
  std::string text = machine.failure;
  if (place.file) {
    text += std::string("\n  at ") + place.file + ":" + std::to_string(place.line) + " (" +
            place.function + ")";
  } else {
    text += describe(machine.failed_in);
  }
  return text + "\n  in " + whereabouts(machine.current);
}

[[noreturn]] void stop(const char* format, va_list arguments) {
  std::vsnprintf(machine.failure, sizeof machine.failure, format, arguments);
  if (!machine.on_fiber) throw Failure(finding());
  leave(machine.current->fiber, true);
  std::abort();  // nobody enters a fiber that failed
}

// What every fiber runs.
void run_thread() {
  arrived();
  (*machine.body)();
  Thread& me = *machine.current;
  me.returned = true;
  leave_warp(me);
  leave(me.fiber, true);
}

void make_resident(const uint3* indices, unsigned count) {
  const dim3 shape = machine.shape.block;
  const int threads = shape.x * shape.y * shape.z;
  if (machine.blocks.size() > count) machine.blocks.resize(count);
  while (machine.blocks.size() < count) machine.blocks.push_back(std::make_unique<Block>());
  machine.stacks.prepare(count * threads);
  machine.alive = count * threads;
  machine.ready.clear();
  machine.ready.reserve(4 * machine.alive);
  machine.polling.reserve(machine.alive);
  machine.next = 0;
  for (unsigned b = 0; b < count; ++b) {
    Block& block = *machine.blocks[b];
    block.index = indices[b];
    block.cluster_rank = b;
    block.alive = threads;
    prepare_shared(block, machine.shape.shared_bytes);
    for (Barrier& barrier : block.barriers) {
      barrier = Barrier{};
      barrier.waiting.reserve(threads);
    }
    block.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
    block.threads.assign(threads, Thread{});
    for (int rank = 0; rank < threads; ++rank) {
      Thread& thread = block.threads[rank];
      thread.block = &block;
      thread.rank = rank;
      const unsigned x = rank % shape.x, yz = rank / shape.x;
      thread.index = {x, yz % shape.y, yz / shape.y};
      block.warps[rank / kLanes].alive |= 1u << rank % kLanes;
      create(thread.fiber, machine.stacks.stack(b * threads + rank), run_thread);
      machine.ready.push_back(&thread);
    }
  }
  if (machine.order == Order::kReverse) std::reverse(machine.ready.begin(), machine.ready.end());
}

// How much a thread is in a hurry, like all of its warp, or of its four warps.
uint64_t haste(const Thread& thread) {
  const int together = machine.skew & 1 ? kLanes : 4 * kLanes;
  const uint64_t group = thread.block->cluster_rank * kMaxBlockThreads + thread.rank / together;
  const uint64_t mixed = (group + 1) * (machine.skew | 1);
  return (mixed ^ mixed >> 29) * 0x9E3779B97F4A7C15 >> 32;
}

// The place in `ready` of one that may run next, drawn.
size_t draw_place() {
  constexpr int kCandidates = 8;
  const auto place = [] { return machine.next + draw() % (machine.ready.size() - machine.next); };
  // Where all seem to spin, the slow may have what the others wait for.
  const bool fair = machine.idle_turns > static_cast<uint64_t>(machine.alive);
  size_t best = place();
  for (int i = 1; i < kCandidates && machine.skew && !fair; ++i) {
    const size_t other = place();
    if (haste(*machine.ready[other]) > haste(*machine.ready[best])) best = other;
  }
  return best;
}

Thread* pick() {
  if (machine.next > static_cast<size_t>(machine.alive) || machine.next == machine.ready.size()) {
    machine.ready.erase(machine.ready.begin(), machine.ready.begin() + machine.next);
    machine.next = 0;
  }
  if (machine.ready.empty()) return nullptr;
  Thread*& chosen = machine.ready[machine.next];
  if (machine.order == Order::kRandom) {
    std::swap(chosen, machine.ready[draw_place()]);
  }
  ++machine.next;
  return chosen;
}

void resume(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  ++machine.turns;
  machine.on_fiber = true;
  enter(thread.fiber);
  machine.on_fiber = false;
  if (machine.failure[0]) throw Failure(finding());
  machine.current = nullptr;
  if (thread.returned) {
    --machine.alive;
    machine.spins = machine.idle_turns = 0;
    if (--thread.block->alive == 0) {
      for (auto check : work().end) check(*thread.block);
    }
  }
}

bool work_late() {
  bool moved = false;
  for (auto work_late : work().idle) moved |= work_late();
  if (moved) machine.idle_turns = 0;
  return moved;
}

void run_resident() {
  int turns = 0;
  while (machine.alive) {
    // Threads that spin must keep neither the conditions nor what is done late from their turn.
    if (++turns > machine.alive) {
      turns = 0;
      if (!poll() && machine.spins > static_cast<uint64_t>(machine.alive)) work_late();
    }
    if (Thread* thread = pick()) {
      resume(*thread);
    } else if (!poll() && !work_late()) {
      throw Failure(describe_deadlock());
    }
  }
  for (const auto& block : machine.blocks) check_shared(*block);
}

void forget_resident() {
  for (auto& block : machine.blocks) {
    for (Thread& thread : block->threads) destroy(thread.fiber, &machine.body);
    block->threads.clear();
  }
#if defined(TILEWISE_THREAD)
  machine.blocks.clear();  // whose memory ThreadSanitizer would remember as theirs
#endif
  machine.polling.clear();
  machine.current = nullptr;
  for (auto forget : work().residence) forget();
}

// The blocks of the i-th cluster, counted x first, then y, then z, and so within it.
std::vector<uint3> blocks_of(uint64_t i) {
  const dim3 grid = machine.shape.grid, cluster = machine.shape.cluster;
  const uint64_t across = grid.x / cluster.x, down = grid.y / cluster.y;
  const auto x = static_cast<unsigned>(i % across), y = static_cast<unsigned>(i / across % down);
  const auto z = static_cast<unsigned>(i / across / down);
  std::vector<uint3> blocks;
  for (unsigned c = 0; c < cluster.z; ++c) {
    for (unsigned b = 0; b < cluster.y; ++b) {
      for (unsigned a = 0; a < cluster.x; ++a) {
        blocks.push_back({x * cluster.x + a, y * cluster.y + b, z * cluster.z + c});
      }
    }
  }
  return blocks;
}

void run_grid() {
  const dim3 grid = machine.shape.grid, cluster = machine.shape.cluster;
  const uint64_t size = uint64_t{cluster.x} * cluster.y * cluster.z;
  std::vector<uint32_t> clusters(uint64_t{grid.x} * grid.y * grid.z / size);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (machine.order == Order::kReverse) std::reverse(clusters.begin(), clusters.end());
  for (size_t i = clusters.size(); machine.order == Order::kRandom && i > 1; --i) {
    std::swap(clusters[i - 1], clusters[draw() % i]);
  }
  for (uint32_t i : clusters) {
    const std::vector<uint3> blocks = blocks_of(i);
    for (auto forget : work().residence) forget();
    make_resident(blocks.data(), blocks.size());
    run_resident();
    forget_resident();
  }
}

}  // namespace

bool launch(const Shape& shape, const void* kernel, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(running);
  machine.shape = shape;
  machine.kernel = kernel;
  machine.body = &body;
  machine.failure[0] = '\0';
  machine.turns = machine.spins = machine.idle_turns = 0;
  blockDim = shape.block;
  gridDim = shape.grid;
  bool failed = false;
  try {
    read_order();
    const Watchdog watchdog;
    run_grid();
  } catch (const std::exception& failure) {
    last_report = failure.what();
    failed = true;
    machine.current = nullptr;
    forget_resident();
  }
  acquire(&machine.body);
  destroy_identities();
  return !failed;
}

const char* report() { return last_report.c_str(); }

uint64_t draw() {  // xorshift
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

bool poll() {
  Thread* const asking = machine.current;
  size_t kept = 0;
  for (Thread* thread : machine.polling) {
    machine.current = thread;
    if (thread->ready(thread->argument)) {
      make_ready(thread);
    } else {
      machine.polling[kept++] = thread;
    }
  }
  const bool any = kept < machine.polling.size();
  machine.polling.resize(kept);
  machine.current = asking;
  return any;
}

void make_ready(Thread* thread) { machine.ready.push_back(thread); }

void suspend(const Wait& wait) {
  Thread& me = *machine.current;
  machine.spins = machine.idle_turns = 0;
  me.wait = wait;
  leave(me.fiber, false);
}

void wait_until(bool (*ready)(void*), void* argument, const char* what, Place place) {
  if (ready(argument)) return;
  Thread& me = *machine.current;
  me.ready = ready;
  me.argument = argument;
  machine.polling.push_back(&me);
  suspend({what, place});
}

void preempt(const char* what, Place place) {
  if (++machine.spins > kMaxSpins) fail(place, "%s: spins, and nothing else happens", what);
  make_ready(machine.current);
  Thread& me = *machine.current;
  me.wait = {what, place};
  leave(me.fiber, false);
}

void on_idle(bool (*work_late)()) { work().idle.push_back(work_late); }
void on_end(void (*check)(const Block&)) { work().end.push_back(check); }
void on_residence(void (*forget)()) { work().residence.push_back(forget); }

void fail(Place place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  machine.failed_at = place;
  stop(format, arguments);
}

void fail_in(const Trace& trace, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  machine.failed_at = {};
  machine.failed_in = trace;
  stop(format, arguments);
}

}  // namespace tilewise::emulation
