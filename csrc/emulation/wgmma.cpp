// The tensor cores of a warpgroup. An instruction is executed once, for all 128 threads, when the
// first of them waits for it and the last has issued it: until then its sums are poisoned, and its
// tiles are read no sooner.
#include "emulation/late.h"
#include "emulation/written.h"
// These redefine words that the C++ library uses, and come after it.
#include "cuda/wgmma.cuh"

namespace tilewise::emulation {
namespace {

constexpr int kThreads = 128;  // of a warpgroup
constexpr int kRows = 64, kDepth = 16, kMaxCols = 256;
constexpr int kMaxOperations = 64, kMaxGroups = 64;  // on their way
constexpr int kMaxShadows = 8;                       // arrays of sums of a thread
constexpr int kMaxWarpgroups = 32;                   // resident
constexpr uint32_t kPoison = 0xFFBFFFFF;             // a NaN that arithmetic turns into another NaN

constexpr const char* kWhat = "wgmma";

struct Operation {
  Wgmma instruction;
  Place place;
  int issued;  // by so many threads
  uint32_t fragments[kThreads][4];
};

// What the sums of a thread hold while their own place is poisoned.
struct Shadow {
  float* sums;
  int count;
  int operations;  // on their way; 0: free
  float values[kMaxCols / 2];
};

struct Member {
  uint64_t issued, retired;    // operations
  uint64_t committed, waited;  // groups
  uint64_t ends[kMaxGroups];   // of groups: the operation after the last
  bool fenced;
  Shadow shadows[kMaxShadows];
  uint8_t shadow_of[kMaxOperations];
};

struct Warpgroup {
  const Block* block;
  int rank;
  uint64_t created, executed;
  Operation operations[kMaxOperations];
  Member members[kThreads];
};

Warpgroup warpgroups[kMaxWarpgroups];
int used;

// One at a time computes, and not on a fiber's small stack.
float a_tile[kRows][kDepth], b_tile[kDepth][kMaxCols], product[kRows][kMaxCols];

void clear(Warpgroup& group) {
  group.created = group.executed = 0;
  for (Member& member : group.members) {
    member.issued = member.retired = member.committed = member.waited = 0;
    member.fenced = false;
    for (Shadow& shadow : member.shadows) shadow.operations = 0;
  }
}

void forget_warpgroups() {
  for (int i = 0; i < used; ++i) clear(warpgroups[i]);
  used = 0;
}

void check_all_waited(const Block& block) {
  for (int i = 0; i < used; ++i) {
    const Warpgroup& group = warpgroups[i];
    if (group.block != &block) continue;
    for (const Member& member : group.members) {
      if (member.retired == member.issued) continue;
      const Operation& operation = group.operations[member.retired % kMaxOperations];
      fail(operation.place, "%s: on its way when its block ended, nobody waited for it", kWhat);
    }
  }
}

const bool registered = (on_residence(forget_warpgroups), on_end(check_all_waited), true);

Warpgroup& mine(Place place) {
  const Thread& me = *machine.current;
  const int rank = me.rank / kThreads;
  if (static_cast<int>(me.block->threads.size()) < (rank + 1) * kThreads) {
    fail(place, "%s: needs a whole warpgroup, 4 warps that begin at a multiple of 4", kWhat);
  }
  for (int i = 0; i < used; ++i) {
    if (warpgroups[i].block == me.block && warpgroups[i].rank == rank) return warpgroups[i];
  }
  if (used == kMaxWarpgroups) fail(place, "%s: not emulated, more than %d warpgroups", kWhat, used);
  Warpgroup& group = warpgroups[used++];
  group.block = me.block;
  group.rank = rank;
  return group;
}

Member& member_of(Warpgroup& group) { return group.members[machine.current->rank % kThreads]; }

// --- Tiles in shared memory.

struct Tile {
  uint32_t start, leading, stride, base, pieces;  // pieces of 16 bytes in a row, 1: no swizzle
  bool mn_major;
};

Tile decode(uint64_t descriptor, bool mn_major, Place place) {
  const auto bytes = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3FFF) << 4; };
  constexpr uint32_t kPieces[] = {1, 8, 4, 2};
  const Tile tile{bytes(0),
                  bytes(16),
                  bytes(32),
                  static_cast<uint32_t>(descriptor >> 49 & 7),
                  kPieces[descriptor >> 62],
                  mn_major};
  constexpr uint64_t kUnused =
      uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3FF} << 52;
  if (descriptor & kUnused) {
    fail(place, "%s: bits that have no meaning are set in the descriptor %016llx", kWhat,
         static_cast<unsigned long long>(descriptor));
  }
  if (tile.pieces > 1 && ((tile.start >> 7) - tile.base) % tile.pieces) {
    fail(place, "%s: the tile at %u must begin with the swizzle's period of %u bytes", kWhat,
         tile.start, tile.pieces * 128);
  }
  return tile;
}

// Where the 16 bytes are that hold 8 neighbours: of row or column `outer` if K major, from K
// `inner` on; else of K `outer`, from row or column `inner` on.
uint32_t piece_at(const Tile& tile, uint32_t outer, uint32_t inner) {
  const uint32_t row = 16 * tile.pieces;  // bytes
  uint32_t offset;
  if (tile.pieces == 1) {
    const uint32_t outer_stride = tile.mn_major ? tile.leading : tile.stride;
    const uint32_t inner_stride = tile.mn_major ? tile.stride : tile.leading;
    offset = outer % 8 * row + outer / 8 * outer_stride + inner / 8 * inner_stride;
  } else if (tile.mn_major) {
    const uint32_t piece = inner / 8;
    offset = outer % 8 * row + outer / 8 * tile.stride + piece % tile.pieces * 16 +
             piece / tile.pieces * tile.leading;
  } else {
    offset = outer % 8 * row + outer / 8 * tile.stride + inner * 2;
  }
  return swizzle_address(tile.start + offset, tile.pieces, tile.base);
}

float to_number(uint16_t bits, bool bf16) {
  return bf16 ? __uint_as_float(uint32_t{bits} << 16) : __half2float(__ushort_as_half(bits));
}

// Call body(row or column, K, piece address) for every piece of a tile of `size` rows or columns.
template <typename Body>
void for_pieces(const Tile& tile, int size, Body body) {
  const int outers = tile.mn_major ? kDepth : size, inners = tile.mn_major ? size : kDepth;
  for (int outer = 0; outer < outers; ++outer) {
    for (int inner = 0; inner < inners; inner += 8) {
      const uint32_t at = piece_at(tile, outer, inner);
      tile.mn_major ? body(inner, outer, at) : body(outer, inner, at);
    }
  }
}

// Call put(row or column, K, number) for every element.
template <typename Put>
void read_tile(const Block& block, const Tile& tile, int size, const Operation& operation,
               Put put) {
  const char* view = async_view(block);
  const bool bf16 = operation.instruction.bf16;
  for_pieces(tile, size, [&](int index, int k, uint32_t at) {
    check_kept(at, 16, kWhat, operation.place);
    uint16_t elements[8];
    __builtin_memcpy(elements, view + at, sizeof elements);
    for (int i = 0; i < 8; ++i) {
      const float number = to_number(elements[i], bf16);
      tile.mn_major ? put(index + i, k, number) : put(index, k + i, number);
    }
  });
}

// Names a warpgroup to ThreadSanitizer.
const void* group_tag(const Warpgroup& group) {
  constexpr int kFirstTag = 8008;  // after those of a block and of its cluster
  return tag(*group.block, kFirstTag + group.rank);
}

// The thread that issues an instruction first answers for what it reads, and whoever waits for the
// instruction comes after that.
void check_tile(const Tile& tile, int size, Place place) {
  const Block& block = *machine.current->block;
  for_pieces(tile, size, [&](int, int, uint32_t at) {
    check_shared_range(at, 16, kWhat, place);
    check_read(block.shared.base + at, 16, kWhat, place);
    check_published(at, 16, kWhat, place);
  });
}

// --- Execution.

// Of element i of a thread's sums.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int col_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

void read_fragments(const Operation& operation) {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = operation.fragments[thread][i / 2];
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int k = i / 4 * 8 + thread % 4 * 2 + i % 2;
      a_tile[row][k] =
          to_number(static_cast<uint16_t>(pair >> i % 2 * 16), operation.instruction.bf16);
    }
  }
}

void execute(Warpgroup& group, const Operation& operation, uint64_t number) {
  const Wgmma& told = operation.instruction;
  if (told.fragments) {
    read_fragments(operation);
  } else {
    read_tile(*group.block, decode(told.a, told.a_mn_major, operation.place), kRows, operation,
              [](int row, int k, float value) { a_tile[row][k] = value; });
  }
  read_tile(*group.block, decode(told.b, told.b_mn_major, operation.place), told.cols, operation,
            [](int col, int k, float value) { b_tile[k][col] = value; });
  for (int row = 0; row < kRows; ++row) {
    float* sums = product[row];
    for (int col = 0; col < told.cols; ++col) sums[col] = a_tile[row][0] * b_tile[0][col];
    for (int k = 1; k < kDepth; ++k) {
      const float factor = a_tile[row][k];
      for (int col = 0; col < told.cols; ++col) sums[col] += factor * b_tile[k][col];
    }
  }
  for (int thread = 0; thread < kThreads; ++thread) {
    Member& member = group.members[thread];
    Shadow& shadow = member.shadows[member.shadow_of[number % kMaxOperations]];
    for (int i = 0; i < told.cols / 2; ++i) {
      const float sum = product[row_of(thread, i)][col_of(thread, i)];
      shadow.values[i] = told.accumulate ? shadow.values[i] + sum : sum;
    }
  }
}

// --- Sums of a thread.

Shadow* find(Member& member, const float* sums) {
  for (Shadow& shadow : member.shadows) {
    if (shadow.operations && shadow.sums == sums) return &shadow;
  }
  return nullptr;
}

Shadow& borrow(Member& member, float* sums, int count, Place place) {
  if (Shadow* shadow = find(member, sums)) {
    if (shadow->count != count) {
      fail(place, "%s: the same sums in another shape, before those on their way were waited for",
           kWhat);
    }
    return *shadow;
  }
  if (!member.fenced) {
    fail(place, "%s: wgmma.fence must come after all that used the sums, and before this", kWhat);
  }
  for (Shadow& shadow : member.shadows) {
    if (shadow.operations) continue;
    shadow.sums = sums;
    shadow.count = count;
    copy_bytes(shadow.values, sums, count * sizeof(float));
    for (int i = 0; i < count; ++i) sums[i] = __uint_as_float(kPoison);
    return shadow;
  }
  fail(place, "%s: not emulated, more than %d arrays of sums at once", kWhat, kMaxShadows);
}

void give_back(Member& member, Shadow& shadow, Place place) {
  for (int i = 0; i < shadow.count; ++i) {
    if (__float_as_uint(shadow.sums[i]) != kPoison) {
      fail(place, "%s: sum %d was written while its wgmma was on its way", kWhat, i);
    }
  }
  copy_bytes(shadow.sums, shadow.values, shadow.count * sizeof(float));
  member.fenced = false;
}

bool is_same(const Wgmma& one, const Wgmma& other) {
  return one.a == other.a && one.b == other.b && !one.fragments == !other.fragments &&
         one.cols == other.cols && one.a_mn_major == other.a_mn_major &&
         one.b_mn_major == other.b_mn_major && one.bf16 == other.bf16 &&
         one.accumulate == other.accumulate;
}

struct Needed {
  const Warpgroup* group;
  uint64_t operations;
};

// Whether every thread has issued them.
bool all_issued(void* argument) {
  const auto* needed = static_cast<const Needed*>(argument);
  const Warpgroup& group = *needed->group;
  return needed->operations <= group.executed ||
         (needed->operations <= group.created &&
          group.operations[(needed->operations - 1) % kMaxOperations].issued == kThreads);
}

}  // namespace

void wgmma_issue(float* sums, const Wgmma& instruction, Place place) {
  Warpgroup& group = mine(place);
  Member& me = member_of(group);
  if (me.issued - me.retired == kMaxOperations) {
    fail(place, "%s: not emulated, more than %d on their way", kWhat, kMaxOperations);
  }
  const uint64_t number = me.issued++;
  Operation& operation = group.operations[number % kMaxOperations];
  if (number == group.created) {
    ++group.created;
    operation.instruction = instruction;
    operation.place = place;
    operation.issued = 0;
    if (!instruction.fragments) {
      check_tile(decode(instruction.a, instruction.a_mn_major, place), kRows, place);
    }
    check_tile(decode(instruction.b, instruction.b_mn_major, place), instruction.cols, place);
    release(group_tag(group));
  } else if (!is_same(operation.instruction, instruction)) {
    fail(place, "%s: all threads of a warpgroup must give the same descriptors and sizes", kWhat);
  }
  if (instruction.fragments) {
    for (int i = 0; i < 4; ++i) {
      operation.fragments[machine.current->rank % kThreads][i] = instruction.fragments[i];
    }
  }
  Shadow& shadow = borrow(me, sums, instruction.cols / 2, place);
  ++shadow.operations;
  me.shadow_of[number % kMaxOperations] = static_cast<uint8_t>(&shadow - me.shadows);
  ++operation.issued;
}

void wgmma_wait(int pending, Place place) {
  Warpgroup& group = mine(place);
  Member& me = member_of(group);
  if (me.committed < me.waited + pending) return;
  const uint64_t target = me.committed - pending;
  if (target == me.waited) return;
  const uint64_t end = me.ends[(target - 1) % kMaxGroups];
  Needed needed{&group, end};
  wait_until(all_issued, &needed, "wgmma.wait_group", place);
  for (; group.executed < end; ++group.executed) {
    execute(group, group.operations[group.executed % kMaxOperations], group.executed);
  }
  for (; me.retired < end; ++me.retired) {
    Shadow& shadow = me.shadows[me.shadow_of[me.retired % kMaxOperations]];
    if (--shadow.operations == 0) give_back(me, shadow, place);
  }
  me.waited = target;
  acquire(group_tag(group));
}

void wgmma_check(const float* sums, Place place) {
  if (find(member_of(mine(place)), sums)) {
    fail(place, "wgmma.wait_group: the sums that it names are still on their way");
  }
}

}  // namespace tilewise::emulation

namespace tilewise {

using emulation::Place;

void wgmma_fence(Place place) { emulation::member_of(emulation::mine(place)).fenced = true; }

void wgmma_commit(Place place) {
  emulation::Member& me = emulation::member_of(emulation::mine(place));
  if (me.committed - me.waited == emulation::kMaxGroups) {
    fail(place, "wgmma.commit_group: not emulated, more than %d groups", emulation::kMaxGroups);
  }
  me.ends[me.committed++ % emulation::kMaxGroups] = me.issued;
}

}  // namespace tilewise
