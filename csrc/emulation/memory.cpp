// The shared memory of resident blocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "emulation/machine.h"
#include "emulation/written.h"

#if defined(TILEWISE_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

namespace tilewise::emulation {
namespace {

constexpr size_t kGuardBytes = 64 * 1024;
constexpr size_t kStaticBytes = 48 * 1024;  // what nvcc allows
constexpr size_t kGaps = 16 * 1024;         // between arrays, and where they begin
constexpr size_t kTagBytes = 64 * 1024;
constexpr size_t kMappedBytes = 3 * kArenaBytes + kTagBytes + 2 * kGuardBytes;
constexpr size_t kGap = 64;  // that nobody may touch, after each array
constexpr size_t kDynamicAlignment = 1024;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

const char kDynamic = 0;  // the key of dynamic shared memory

// Whether AddressSanitizer lets anybody touch this memory. Its macros do nothing in this library.
void forbid([[maybe_unused]] char* begin, [[maybe_unused]] size_t bytes) {
#if defined(TILEWISE_ADDRESS)
  __asan_poison_memory_region(begin, bytes);
#endif
}
void permit([[maybe_unused]] char* begin, [[maybe_unused]] size_t bytes) {
#if defined(TILEWISE_ADDRESS)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

SharedArray* find(SharedMemory& memory, const void* key) {
  for (SharedArray& array : memory.arrays) {
    if (array.key == key) return &array;
  }
  return nullptr;
}

void* allocate(SharedMemory& memory, const void* key, const char* name, size_t bytes,
               size_t alignment) {
  const size_t offset = (memory.used + alignment - 1) / alignment * alignment;
  memory.used = offset + bytes + kGap;
  memory.arrays.push_back({key, name, offset, bytes});
  permit(memory.base + offset, bytes);
  return memory.base + offset;
}

char* map() {
  void* memory = mmap(nullptr, kMappedBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* base = static_cast<char*>(memory) + kGuardBytes;
  mprotect(base - kGuardBytes, kGuardBytes, PROT_NONE);
  mprotect(base + kArenaBytes, kGuardBytes, PROT_NONE);
  return base;
}

}  // namespace

void prepare_shared(Block& block, size_t dynamic_bytes) {
  SharedMemory& memory = block.shared;
  if (!memory.base) memory.base = map();
  permit(memory.base, kArenaBytes);
  std::memset(memory.base, kPoison, dynamic_bytes + kStaticBytes + kGaps);
  forbid(memory.base, kArenaBytes);
  block.tags = memory.base + kArenaBytes + kGuardBytes;
  memory.written = memory.base + kArenaBytes + kGuardBytes + kTagBytes;
  memory.published = memory.written + kArenaBytes;
  mark_in(block, 0, dynamic_bytes + kStaticBytes + kGaps, Written::never);
  memory.arrays.clear();
  memory.arrays.reserve(64);
  memory.used = kDynamicAlignment;  // so that nothing is at offset 0, which looks like null
  if (dynamic_bytes) {
    allocate(memory, &kDynamic, "dynamic shared memory", dynamic_bytes, kDynamicAlignment);
  }
}

SharedMemory::~SharedMemory() {
  if (!base) return;
  permit(base, kArenaBytes);
  munmap(base - kGuardBytes, kMappedBytes);
}

const void* tag(const Block& block, int i) { return static_cast<char*>(block.tags) + 8 * i; }

void check_shared([[maybe_unused]] const Block& block) {
#if !defined(TILEWISE_ADDRESS)  // which sees it at once
  const SharedMemory& memory = block.shared;
  for (const SharedArray& array : memory.arrays) {
    const char* end = memory.base + array.offset + array.bytes;
    for (size_t i = 0; i < kGap; ++i) {
      if (static_cast<unsigned char>(end[i]) != kPoison) {
        fail({"shared memory", 0, array.name}, "shared: byte %zu after the end of %s was written",
             i, array.name);
      }
    }
  }
#endif
}

void* shared(const void* key, const char* name, size_t bytes, size_t alignment, Place place) {
  SharedMemory& memory = machine.current->block->shared;
  if (SharedArray* array = find(memory, key)) return memory.base + array->offset;
  size_t fixed = bytes;
  for (const SharedArray& array : memory.arrays) {
    if (array.key != &kDynamic) fixed += array.bytes;
  }
  const size_t total = fixed + machine.shape.shared_bytes;
  if (fixed > kStaticBytes || total > kMaxSharedBytes) {
    fail(place, "shared: at most %zu bytes may be static and %zu in all, %s makes them %zu and %zu",
         kStaticBytes, kMaxSharedBytes, name, fixed, total);
  }
  return allocate(memory, key, name, bytes, std::max<size_t>(alignment, 16));
}

void* dynamic_shared() {
  SharedMemory& memory = machine.current->block->shared;
  const SharedArray* array = find(memory, &kDynamic);
  // Without any, an address that no access may follow.
  return array ? memory.base + array->offset : memory.base + kArenaBytes;
}

size_t dynamic_shared_bytes() { return machine.shape.shared_bytes; }

int shared_rank(const void* address) {
  const auto at = static_cast<const char*>(address);
  for (const auto& block : machine.blocks) {
    const char* base = block->shared.base;
    if (base && at >= base && at < base + kArenaBytes) return static_cast<int>(block->cluster_rank);
  }
  return -1;
}

uint32_t shared_offset(const void* address, Place place) {
  const Block& block = *machine.current->block;
  if (shared_rank(address) != static_cast<int>(block.cluster_rank)) {
    fail(place, "shared: the address must be in this block's shared memory, got %p", address);
  }
  return static_cast<uint32_t>(static_cast<const char*>(address) - block.shared.base);
}

char* shared_base(unsigned cluster_rank) {
  return cluster_rank < machine.blocks.size() ? machine.blocks[cluster_rank]->shared.base : nullptr;
}

}  // namespace tilewise::emulation
