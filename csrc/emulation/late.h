// What the units that work on their own have in common: they move bytes later than the program
// says so, on behalf of threads, and see shared memory through a proxy of their own. Only for the
// files of this folder that are compiled into the runtime.
#pragma once

#include "emulation/machine.h"

namespace tilewise::emulation {

// Without the functions of the C library, which the sanitizers watch.
void copy_bytes(void* to, const void* from, size_t bytes);
void poison_bytes(void* at, size_t bytes);

// The current thread reads or writes what its kernel's own code does not: AddressSanitizer checks
// it, ThreadSanitizer notes it. (The build "memory": written.h.)
void check_read(const void* from, size_t bytes, const char* what, Place place);
void check_write(void* to, size_t bytes, const char* what, Place place);

// The same of an offset into this block's shared memory, which must lie inside of an array.
void check_shared_range(uint32_t offset, size_t bytes, const char* what, Place place);

// --- Shared memory as the copy engine and wgmma see it: what they write themselves at once, what
// threads store only after a fence.proxy.async of any thread of the block.

const char* async_view(const Block& block);
void publish(const Block& block);
// Write where both see it.
void write_shared(const Block& block, uint32_t offset, const void* from, size_t bytes);
void poison_shared(const Block& block, uint32_t offset, size_t bytes);

// Where the swizzle of 16-byte pieces puts an address: `pieces`, 1, 2, 4 or 8, change places
// according to the 128 bytes they are in, counted from `first`.
inline uint32_t swizzle_address(uint32_t address, uint32_t pieces, uint32_t first) {
  return address ^ (((address >> 7) - first) % pieces) << 4;
}

// Bytes came to a barrier.
void barrier_complete(uint64_t* barrier, uint32_t bytes, const char* what, Place place);
// The address that stands for the barrier's phase under way.
const void* barrier_tag(const uint64_t* barrier);
void check_barrier(const uint64_t* barrier, const char* what, Place place);

}  // namespace tilewise::emulation
