#include "emulation/written.h"

#if defined(TILEWISE_MEMORY)
#include <algorithm>
#include <cstdio>
#include <map>
#include <vector>

namespace tilewise::emulation {
namespace {

struct Allocation {
  size_t bytes;
  std::vector<Written> written;
};

std::map<const char*, Allocation>& allocations() {
  static std::map<const char*, Allocation> all;
  return all;
}

// Bytes of one array, and what is known of them.
struct Known {
  Written* written = nullptr;    // null: not watched
  Written* published = nullptr;  // of shared memory
  size_t bytes = 0;              // of those asked for that lie in it
};

Known known_in(const SharedMemory& memory, const char* at, size_t bytes) {
  const auto offset = static_cast<size_t>(at - memory.base);
  if (!memory.base || offset >= kArenaBytes) return {};
  return {reinterpret_cast<Written*>(memory.written) + offset,
          reinterpret_cast<Written*>(memory.published) + offset,
          std::min(bytes, kArenaBytes - offset)};
}

Known known_of(const char* at, size_t bytes) {
  const Block* mine = machine.current ? machine.current->block : nullptr;
  if (mine) {
    if (const Known known = known_in(mine->shared, at, bytes); known.written) return known;
  }
  for (const auto& block : machine.blocks) {
    if (block.get() == mine) continue;
    if (const Known known = known_in(block->shared, at, bytes); known.written) return known;
  }
  // The array that begins there or before.
  auto next = allocations().upper_bound(at);
  if (next == allocations().begin()) return {};
  auto& [begin, found] = *--next;
  const auto offset = static_cast<size_t>(at - begin);
  if (offset >= found.bytes) return {};
  return {found.written.data() + offset, nullptr, std::min(bytes, found.bytes - offset)};
}

}  // namespace

void mark(const void* at, size_t bytes, Written how) {
  const Known known = known_of(static_cast<const char*>(at), bytes);
  for (size_t i = 0; i < known.bytes; ++i) known.written[i] = how;
  for (size_t i = 0; i < known.bytes && known.published; ++i) known.published[i] = Written::never;
}

void mark_in(const Block& block, uint32_t offset, size_t bytes, Written how) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    block.shared.written[i] = block.shared.published[i] = static_cast<char>(how);
  }
}

void mark_published(const Block& block) {
  const SharedMemory& memory = block.shared;
  for (size_t i = 0; i < memory.used; ++i) memory.published[i] = memory.written[i];
}

Unwritten first_unwritten(const void* from, size_t bytes) {
  const auto* at = static_cast<const char*>(from);
  const Known known = known_of(at, bytes);
  for (size_t i = 0; i < known.bytes; ++i) {
    if (known.written[i] != Written::yes) return {at + i, known.written[i]};
  }
  return {nullptr, Written::yes};
}

const char* describe(Written how) {
  switch (how) {
    case Written::never: return "was never written";
    case Written::on_its_way: return "is still on its way";
    case Written::block_ended: return "went with its block, which has ended";
    case Written::yes: break;
  }
  return "was written";
}

void name(const void* byte, char (&text)[256]) {
  const auto* at = static_cast<const char*>(byte);
  for (const auto& block : machine.blocks) {
    const SharedMemory& memory = block->shared;
    const auto offset = static_cast<size_t>(at - memory.base);
    if (!memory.base || offset >= kArenaBytes) continue;
    char owner[48] = "";
    if (block.get() != machine.current->block) {
      std::snprintf(owner, sizeof owner, " in block %u of the cluster", block->cluster_rank);
    }
    for (const SharedArray& array : memory.arrays) {
      if (offset < array.offset || offset >= array.offset + array.bytes) continue;
      std::snprintf(text, sizeof text, "byte %zu of %s%s", offset - array.offset, array.name,
                    owner);
      return;
    }
    std::snprintf(text, sizeof text, "byte %zu of shared memory%s, in no array,", offset, owner);
    return;
  }
  const auto& [begin, allocation] = *std::prev(allocations().upper_bound(at));
  std::snprintf(text, sizeof text, "byte %zu of %zu from cudaMalloc",
                static_cast<size_t>(at - begin), allocation.bytes);
}

void check_written(const void* from, size_t bytes, const char* what, Place place) {
  const Unwritten found = first_unwritten(from, bytes);
  if (!found.at) return;
  char text[256];
  name(found.at, text);
  fail(place, "%s: uninitialised memory, %s %s", what, text, describe(found.how));
}

namespace {

// The first of these bytes that is not published.
const char* first_unpublished(uint32_t offset, size_t bytes) {
  const SharedMemory& memory = machine.current->block->shared;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (memory.published[i] != static_cast<char>(Written::yes)) return memory.base + i;
  }
  return nullptr;
}

}  // namespace

void check_published(uint32_t offset, size_t bytes, const char* what, Place place) {
  check_written(machine.current->block->shared.base + offset, bytes, what, place);
  const char* found = first_unpublished(offset, bytes);
  if (!found) return;
  char text[256];
  name(found, text);
  fail(place, "%s: no fence.proxy.async has come since %s was written", what, text);
}

void check_kept(uint32_t offset, size_t bytes, const char* what, Place place) {
  const char* found = first_unpublished(offset, bytes);
  if (!found) return;
  char text[256];
  name(found, text);
  fail(place, "%s: %s was overwritten before it was read", what, text);
}

void remember_allocation(const void* memory, size_t bytes) {
  allocations()[static_cast<const char*>(memory)] = {bytes, std::vector<Written>(bytes)};
}

void forget_allocation(const void* memory) {
  allocations().erase(static_cast<const char*>(memory));
}

void copied(const void* to, const void* from, size_t bytes) {
  const auto* source = static_cast<const char*>(from);
  const auto* target = static_cast<const char*>(to);
  for (size_t i = 0; i < bytes; ++i) {
    mark(target + i, 1, first_unwritten(source + i, 1).how);
  }
}

}  // namespace tilewise::emulation

#else

namespace tilewise::emulation {

void mark(const void*, size_t, Written) {}
void mark_in(const Block&, uint32_t, size_t, Written) {}
void mark_published(const Block&) {}
void check_written(const void*, size_t, const char*, Place) {}
void check_published(uint32_t, size_t, const char*, Place) {}
Unwritten first_unwritten(const void*, size_t) { return {nullptr, Written::yes}; }
void check_kept(uint32_t, size_t, const char*, Place) {}
void remember_allocation(const void*, size_t) {}
void forget_allocation(const void*) {}
void copied(const void*, const void*, size_t) {}

}  // namespace tilewise::emulation
#endif
