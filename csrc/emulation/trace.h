// Where in the source of a kernel an address of its machine code is: for findings in plain code,
// which calls nothing that could bring its place along.
#pragma once

#include <string>

namespace tilewise::emulation {

// Addresses of code: where a thread is, and where it was called from.
struct Trace {
  static constexpr int kDepth = 8;
  const void* at[kDepth] = {};
  int count = 0;
};

// From the code at `address`, whose function has this frame on the current thread's stack.
Trace trace_from(const void* address, const void* frame);

// "\n  at file:line (function)" for each place in a kernel's own source, innermost first.
std::string describe(const Trace& trace);

}  // namespace tilewise::emulation
