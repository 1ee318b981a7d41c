// Bytes that move late.
#include "emulation/late.h"

#include "emulation/written.h"

#if defined(TILEWISE_ADDRESS)
#include <sanitizer/asan_interface.h>
#elif defined(TILEWISE_THREAD)
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
#endif

namespace tilewise::emulation {
namespace {

constexpr size_t kViewBytes = 512 * 1024;  // as many as an arena has
constexpr unsigned kMaxClusterBlocks = 16;

char views[kMaxClusterBlocks][kViewBytes];
bool is_used[kMaxClusterBlocks];

void forget_views() {
  for (bool& used : is_used) used = false;
}

const bool registered = (on_residence(forget_views), true);

char* view_of(const Block& block) {
  char* view = views[block.cluster_rank];
  if (!is_used[block.cluster_rank]) {
    is_used[block.cluster_rank] = true;
    poison_bytes(view, kViewBytes);
  }
  return view;
}

// The compiler is told not to make a call of these loops.
template <typename Word>
void move(char*& to, const char*& from, size_t& bytes) {
  for (; bytes >= sizeof(Word); bytes -= sizeof(Word)) {
    Word word;
    __builtin_memcpy(&word, from, sizeof word);
    __builtin_memcpy(to, &word, sizeof word);
    to += sizeof(Word);
    from += sizeof(Word);
  }
}

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* target = static_cast<char*>(to);
  auto* source = static_cast<const char*>(from);
  move<unsigned __int128>(target, source, bytes);
  move<char>(target, source, bytes);
}

void poison_bytes(void* at, size_t bytes) {
  auto* target = static_cast<char*>(at);
  for (; bytes >= 8; bytes -= 8, target += 8) {
    const uint64_t poison = ~uint64_t{0};
    __builtin_memcpy(target, &poison, sizeof poison);
  }
  for (; bytes; --bytes, ++target) *target = static_cast<char>(-1);
}

void check_read([[maybe_unused]] const void* from, [[maybe_unused]] size_t bytes,
                [[maybe_unused]] const char* what, [[maybe_unused]] Place place) {
#if defined(TILEWISE_ADDRESS)
  if (bytes && __asan_region_is_poisoned(const_cast<void*>(from), bytes)) {
    fail(place, "%s: reads %zu bytes at %p, which are not all the kernel's", what, bytes, from);
  }
#elif defined(TILEWISE_THREAD)
  if (bytes) __tsan_read_range(const_cast<void*>(from), bytes);
#endif
}

void check_write([[maybe_unused]] void* to, [[maybe_unused]] size_t bytes,
                 [[maybe_unused]] const char* what, [[maybe_unused]] Place place) {
#if defined(TILEWISE_ADDRESS)
  if (bytes && __asan_region_is_poisoned(to, bytes)) {
    fail(place, "%s: writes %zu bytes at %p, which are not all the kernel's", what, bytes, to);
  }
#elif defined(TILEWISE_THREAD)
  if (bytes) __tsan_write_range(to, bytes);
#endif
}

void check_shared_range(uint32_t offset, size_t bytes, const char* what, Place place) {
  for (const SharedArray& array : machine.current->block->shared.arrays) {
    if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return;
  }
  fail(place, "%s: shared memory must hold the bytes %u to %zu, but no array does", what, offset,
       offset + bytes);
}

const char* async_view(const Block& block) { return view_of(block); }

void publish(const Block& block) {
  copy_bytes(view_of(block), block.shared.base, block.shared.used);
  mark_published(block);
}

void write_shared(const Block& block, uint32_t offset, const void* from, size_t bytes) {
  copy_bytes(block.shared.base + offset, from, bytes);
  copy_bytes(view_of(block) + offset, from, bytes);
  mark_in(block, offset, bytes, Written::yes);
}

void poison_shared(const Block& block, uint32_t offset, size_t bytes) {
  poison_bytes(block.shared.base + offset, bytes);
  poison_bytes(view_of(block) + offset, bytes);
  mark_in(block, offset, bytes, Written::on_its_way);
}

}  // namespace tilewise::emulation
