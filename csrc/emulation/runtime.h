// What the device code of a kernel asks of the emulator. A CUDA thread is a fiber: it runs until it
// waits for others, and then another runs. All threads of the resident blocks (one, or a cluster)
// take turns on one thread of the host.
//
//   launch             runs a kernel: every block of the grid, a cluster at a time
//   sync_block, sync_named, arrive_named, exchange    where threads of a block or a warp meet
//   wait_until         waits for anything else; the condition is asked when nobody else can run
//   on_idle            what is done late, such as asynchronous copies: called when all wait
//   fail               ends the launch with a report; the launcher returns cudaErrorLaunchFailure
//   release, acquire   tell the race detector what is ordered: nothing else is but sync_*
//   shared, dynamic_shared, shared_offset, shared_base    the shared memory of resident blocks
//
// This library is compiled without sanitizers, whatever the kernels are compiled with: what it does
// on behalf of a thread is not the thread's own access. Under ThreadSanitizer each fiber is a
// thread of its own. Functions that run on a fiber must not allocate, nor call memcpy on memory of
// the kernels, for the sanitizer would see both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "emulation/place.h"
#include "emulation/vectors.h"

// The built-in variables: set anew whenever another thread runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace tilewise::emulation {

constexpr int kLanes = 32;
constexpr int kNamedBarriers = 16;
constexpr int kMaxBlockThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;     // of a block, static and dynamic
constexpr size_t kDefaultSharedBytes = 48 * 1024;  // dynamic, without cudaFuncSetAttribute

// --- Launching. `kernel` is the address from which the report has its name, `body` calls it.

struct Shape {
  dim3 grid;
  dim3 block;
  dim3 cluster{1, 1, 1};
  size_t shared_bytes = 0;
};

// Run a kernel to its end. False if it failed; report() then says how.
bool launch(const Shape& shape, const void* kernel, const std::function<void()>& body);

// Of the launch that failed last on this thread of the host.
const char* report();

// --- The thread that runs. Ranks are linear: x first, then y, then z.

int thread_rank();          // in its block
int lane();                 // in its warp
unsigned active_lanes();    // of its warp, that have not returned
unsigned cluster_rank();    // of its block in the cluster
unsigned cluster_blocks();  // how many there are
dim3 cluster_shape();

// --- Waiting. `what` names the instruction in reports and must be a literal.

void sync_block(const char* what, Place place);
// Also returns the number of threads of the block with a true predicate.
int sync_block_count(bool predicate, const char* what, Place place);
void sync_named(int id, int threads, const char* what, Place place);
void arrive_named(int id, int threads, const char* what, Place place);

// All lanes of `mask` meet here and bring a value. `values` receives that of each lane in the
// returned set; those that returned from the kernel are not in it. `ordered`: whether what lanes
// did before happens before what they do after, as with __syncwarp and unlike with shuffles.
unsigned exchange(unsigned mask, uint64_t value, uint64_t (&values)[kLanes], bool ordered,
                  const char* what, Place place);

void wait_until(bool (*ready)(void*), void* argument, const char* what, Place place);

// Let others run. A thread that spins on memory must call it, or none of them ever will.
void preempt(const char* what, Place place);

// Have `work` called whenever no thread can run; it returns whether that may have changed.
// Registered once for all launches; runs outside of any thread.
void on_idle(bool (*work)());

// Have `check` called when the last thread of a block has returned; it may fail.
void on_end(void (*check)(const struct Block& block));

// Have `forget` called before the first block of a cluster and after its last thread.
void on_residence(void (*forget)());

// End the launch. The message should begin with the name of the instruction.
[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// --- Order between threads, for ThreadSanitizer; nothing in other builds.

void release(const void* address);
void acquire(const void* address);
void fence(bool of_block);  // __threadfence, __threadfence_block
// Around every atomic operation; `read` are the bytes whose value it depends on.
void before_atomic(const void* address, size_t read, const char* what, Place place);
void after_atomic(const void* address);

// --- Shared memory: poisoned when a block begins, one arena for each resident block.

// The array that belongs to `key` in this block, made on first use.
void* shared(const void* key, const char* name, size_t bytes, size_t alignment, Place place);
void* dynamic_shared();
size_t dynamic_shared_bytes();

// Where in its block's shared memory a generic address is; fails if it is not in this block's.
uint32_t shared_offset(const void* address, Place place);
// The block's rank in the cluster whose shared memory holds the address, or -1.
int shared_rank(const void* address);
char* shared_base(unsigned cluster_rank);

}  // namespace tilewise::emulation
