// What the race detector is told. A relaxed atomic orders nothing by itself; it does together with
// a fence before it (release) or after it (acquire). A fence is taken to hold for all that its
// thread does later, so a write between the fence and the atomic passes for ordered.
#include "emulation/machine.h"
#include "emulation/written.h"

#if defined(TILEWISE_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace tilewise::emulation {
namespace {

constexpr int kFirstTag = 2 * kNamedBarriers + kMaxBlockThreads / kLanes * (kLanes + 1);
constexpr int kTags = 4096;

// What stands for an atomic among the threads of one block.
[[maybe_unused]] const void* block_tag(const void* address) {
  const auto hash = (reinterpret_cast<uintptr_t>(address) >> 2) * 0x9E3779B97F4A7C15;
  return tag(*machine.current->block, kFirstTag + static_cast<int>((hash >> 40) % kTags));
}

}  // namespace

void release([[maybe_unused]] const void* address) {
#if defined(TILEWISE_THREAD)
  __tsan_release(const_cast<void*>(address));
#endif
}

void acquire([[maybe_unused]] const void* address) {
#if defined(TILEWISE_THREAD)
  __tsan_acquire(const_cast<void*>(address));
#endif
}

void fence(bool of_block) {
  Thread& me = *machine.current;
  me.fenced_block = true;
  if (!of_block) me.fenced = true;
  if (!me.last_atomic) return;
  acquire(block_tag(me.last_atomic));
  if (!of_block) acquire(me.last_atomic);
}

void before_atomic(const void* address, size_t read, const char* what, Place place) {
  const Thread* me = machine.current;
  if (me && me->fenced_block) release(block_tag(address));
  if (me && me->fenced) release(address);
  if (me) check_written(address, read, what, place);
}

void after_atomic(const void* address) {
  Thread* me = machine.current;
  if (!me) return;
  me->last_atomic = address;
  if (me->fenced_block) acquire(block_tag(address));
  if (me->fenced) acquire(address);
}

}  // namespace tilewise::emulation
