// A stack of its own and what it takes to switch to it and back.
#pragma once

#include <cstddef>

namespace tilewise::emulation {

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  char* stack = nullptr;          // its lowest byte
  void* fake_stack = nullptr;     // of AddressSanitizer
  void* sanitized = nullptr;      // what ThreadSanitizer takes for a thread
};

// Stacks for this many fibers, each above pages that nobody may touch. For every cluster they are
// poisoned, where locals begin, so that what earlier threads left there is not taken for a value.
class Stacks {
 public:
  ~Stacks();
  void prepare(int count);
  char* stack(int i) const;

 private:
  void unmap();
  char* memory_ = nullptr;
  int count_ = 0;
};

// Let `fiber` begin in `entry`, which never returns, when it is first switched to.
void create(Fiber& fiber, char* stack, void (*entry)());
// Also of one that did not end; what it did happens before what `end` names to release and acquire.
void destroy(Fiber& fiber, const void* end);
// After the last fiber of a launch.
void destroy_identities();

// From the host's own stack to the fiber, until it calls leave.
void enter(Fiber& fiber);
// Back; `last` if the fiber is never entered again. A fiber calls `arrived` first of all.
void leave(Fiber& fiber, bool last);
void arrived();

}  // namespace tilewise::emulation
