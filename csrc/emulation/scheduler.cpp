// Who runs next. TILEWISE_EMULATION_ORDER says in which order blocks and threads take their turns:
// "forward" (the default), "reverse", or a number: the seed of a random order.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulation/machine.h"

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
std::vector<bool (*)()> idle_work;
std::vector<void (*)()> residence_work;

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
  } else {
    throw Failure(std::string("TILEWISE_EMULATION_ORDER: must be forward, reverse or a number, "
                              "got ") +
                  asked);
  }
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

Thread* pick() {
  if (machine.next > static_cast<size_t>(machine.alive) || machine.next == machine.ready.size()) {
    machine.ready.erase(machine.ready.begin(), machine.ready.begin() + machine.next);
    machine.next = 0;
  }
  if (machine.ready.empty()) return nullptr;
  Thread*& chosen = machine.ready[machine.next];
  if (machine.order == Order::kRandom) {
    std::swap(chosen, machine.ready[machine.next + draw() % (machine.ready.size() - machine.next)]);
  }
  ++machine.next;
  return chosen;
}

// Whether any condition that is waited for has come true.
bool poll() {
  bool any = false;
  for (size_t i = 0; i < machine.polling.size();) {
    Thread* thread = machine.polling[i];
    machine.current = thread;
    const bool is_ready = thread->ready(thread->argument);
    machine.current = nullptr;
    if (is_ready) {
      any = true;
      machine.polling.erase(machine.polling.begin() + i);
      make_ready(thread);
    } else {
      ++i;
    }
  }
  return any;
}

void resume(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  machine.on_fiber = true;
  enter(thread.fiber);
  machine.on_fiber = false;
  machine.current = nullptr;
  if (machine.failure[0]) throw Failure(machine.failure);
  if (thread.returned) {
    --thread.block->alive;
    --machine.alive;
    machine.spins = 0;
  }
}

bool work_late() {
  bool moved = false;
  for (auto work : idle_work) moved |= work();
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
  for (auto forget : residence_work) forget();
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
    for (auto forget : residence_work) forget();
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
  machine.spins = 0;
  blockDim = shape.block;
  gridDim = shape.grid;
  bool failed = false;
  try {
    read_order();
    run_grid();
  } catch (const std::exception& failure) {
    last_report = failure.what();
    failed = true;
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

void make_ready(Thread* thread) { machine.ready.push_back(thread); }

void suspend(const Wait& wait) {
  Thread& me = *machine.current;
  machine.spins = 0;
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

void on_idle(bool (*work)()) { idle_work.push_back(work); }
void on_residence(void (*forget)()) { residence_work.push_back(forget); }

void fail(Place place, const char* format, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const std::string where = whereabouts(machine.current);
  std::snprintf(machine.failure, sizeof machine.failure, "%s\n  at %s:%d (%s)\n  in %s", message,
                place.file, place.line, place.function, where.c_str());
  if (!machine.on_fiber) throw Failure(machine.failure);
  leave(machine.current->fiber, true);
  std::abort();  // nobody enters a fiber that failed
}

}  // namespace tilewise::emulation
