// What was written: a byte for each byte of shared memory, and of what cudaMalloc gave. Only the
// build "memory" keeps it; in the others these functions do nothing.
#pragma once

#include "emulation/machine.h"

namespace tilewise::emulation {

enum class Written : char { never, yes, on_its_way, block_ended };

// Threads store, or may. Units that work on their own then see nothing there until a fence.
void mark(const void* at, size_t bytes, Written how);
// Units that work on their own store, which all see.
void mark_in(const Block& block, uint32_t offset, size_t bytes, Written how);
void mark_published(const Block& block);  // what threads stored

// What the current thread reads, on behalf of a unit, must be written; what a unit that works on
// its own reads in this block's shared memory must be published too.
void check_written(const void* from, size_t bytes, const char* what, Place place);
void check_published(uint32_t offset, size_t bytes, const char* what, Place place);
// The same when the unit comes to it, later.
void check_kept(uint32_t offset, size_t bytes, const char* what, Place place);

// What an access by the code itself reads: 0, or a byte of it that is not written, as above.
struct Unwritten {
  const char* at;
  Written how;
};
Unwritten first_unwritten(const void* from, size_t bytes);
// "byte 132 of held", and "was never written".
void name(const void* byte, char (&text)[256]);
const char* describe(Written how);

// --- Memory of the device.

void remember_allocation(const void* memory, size_t bytes);
void forget_allocation(const void* memory);
void copied(const void* to, const void* from, size_t bytes);  // with what is known of it

}  // namespace tilewise::emulation
