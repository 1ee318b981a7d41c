// The copy engine. A load poisons its destination when it is issued, and is executed when no thread
// can go on without one, in an order that is the scheduler's. A store reads and writes when its
// group is waited for; one that nobody waits for must not outlive its shared memory.
#include <algorithm>
#include <atomic>

#include "emulation/hopper.h"
#include "emulation/late.h"
#include "emulation/written.h"

namespace tilewise::emulation {
namespace {

constexpr int kMaxRank = 5;
constexpr int kPiece = 16;  // bytes, of which inner rows of boxes consist
constexpr int kMaxCopies = 4096;
constexpr uint64_t kMark = 0x74656e736f726d61;

constexpr const char* kLoad = "cp.async.bulk.tensor load";
constexpr const char* kStore = "cp.async.bulk.tensor store";

// What CUtensorMap holds here.
struct Map {
  uint64_t mark;
  char* base;
  uint64_t sizes[kMaxRank];
  uint64_t strides[kMaxRank - 1];  // bytes
  uint16_t box[kMaxRank];
  uint8_t rank, element, swizzle;

  uint32_t row_bytes() const { return box[0] * uint32_t{element}; }
  uint32_t rows() const {
    uint32_t product = 1;
    for (int i = 1; i < rank; ++i) product *= box[i];
    return product;
  }
  uint32_t bytes() const { return rows() * row_bytes(); }
  uint32_t pieces() const { return 1u << swizzle; }  // that are exchanged
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct Copy {
  Map map;
  int at[kMaxRank];
  uint32_t offset;  // in shared memory
  const Block* block;
  uint64_t* barrier;  // of a load
  const Thread* thread;
  int group;  // of a store
  Place place;
};

// Without allocation: fibers call these.
struct Copies {
  Copy list[kMaxCopies];
  int count = 0;

  void add(const Copy& copy) {
    if (count == kMaxCopies) fail(copy.place, "cp.async.bulk: more than %d at once", kMaxCopies);
    copy_bytes(&list[count++], &copy, sizeof copy);
  }

  void remove(int i) {
    for (--count; i < count; ++i) copy_bytes(&list[i], &list[i + 1], sizeof list[i]);
  }
};

Copies loads, stores;

struct Groups {
  const Thread* thread;
  int committed;
};
constexpr int kMaxStorers = 4096;
Groups groups[kMaxStorers];  // of the threads that store
int storers;

Groups& groups_of(const Thread* thread) {
  for (int i = 0; i < storers; ++i) {
    if (groups[i].thread == thread) return groups[i];
  }
  if (storers == kMaxStorers) fail(Place::here(), "cp.async.bulk: more than %d threads", storers);
  groups[storers] = {thread, 0};
  return groups[storers++];
}

// Call body for each row of the box: where it is in the tensor, how many bytes of it are inside
// from which on, and its number. A row that is outside altogether has no bytes.
template <typename Body>
void for_rows(const Map& map, const int (&at)[kMaxRank], Body body) {
  const int64_t first = at[0], end = first + map.box[0], size = static_cast<int64_t>(map.sizes[0]);
  const int64_t from = std::max<int64_t>(first, 0), to = std::min(end, size);
  for (uint32_t row = 0; row < map.rows(); ++row) {
    char* address = map.base + from * map.element;
    bool inside = from < to;
    uint32_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = at[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside &= 0 <= index && index < static_cast<int64_t>(map.sizes[i]);
      if (inside) address += index * static_cast<int64_t>(map.strides[i - 1]);
    }
    body(row, address, inside ? (from - first) * map.element : 0,
         inside ? (to - from) * map.element : 0);
  }
}

// Where byte i of a row is.
uint32_t shared_place(const Copy& copy, uint32_t row, uint32_t i) {
  return swizzle_address(copy.offset + row * copy.map.row_bytes() + i, copy.map.pieces(), 0);
}

constexpr uint32_t kMaxRowBytes = 256 * 8;

void execute_load(const Copy& copy) {
  for_rows(copy.map, copy.at, [&](uint32_t row, const char* from, int64_t skipped, int64_t bytes) {
    alignas(kPiece) char buffer[kMaxRowBytes] = {};
    copy_bytes(buffer + skipped, from, static_cast<size_t>(bytes));
    for (uint32_t i = 0; i < copy.map.row_bytes(); i += kPiece) {
      write_shared(*copy.block, shared_place(copy, row, i), buffer + i, kPiece);
    }
  });
  barrier_complete(copy.barrier, copy.map.bytes(), kLoad, copy.place);
}

// Call body for where each element is in shared memory that is inside of the tensor.
template <typename Body>
void for_elements(const Copy& copy, Body body) {
  for_rows(copy.map, copy.at, [&](uint32_t row, char*, int64_t skipped, int64_t bytes) {
    for (int64_t i = skipped; i < skipped + bytes; i += copy.map.element) {
      body(shared_place(copy, row, static_cast<uint32_t>(i)));
    }
  });
}

void execute_store(const Copy& copy) {
  for_elements(copy, [&](uint32_t at) { check_kept(at, copy.map.element, kStore, copy.place); });
  const char* view = async_view(*copy.block);
  for_rows(copy.map, copy.at, [&](uint32_t row, char* to, int64_t skipped, int64_t bytes) {
    alignas(kPiece) char buffer[kMaxRowBytes];
    for (uint32_t i = 0; i < copy.map.row_bytes(); i += kPiece) {
      copy_bytes(buffer + i, view + shared_place(copy, row, i), kPiece);
    }
    copy_bytes(to, buffer + skipped, static_cast<size_t>(bytes));
  });
}

// One load, when nobody can go on.
bool load_one() {
  if (!loads.count) return false;
  int chosen = 0;
  if (machine.order == Order::kReverse) chosen = loads.count - 1;
  if (machine.order == Order::kRandom) chosen = static_cast<int>(draw() % loads.count);
  const Copy copy = loads.list[chosen];
  loads.remove(chosen);
  execute_load(copy);
  return true;
}

// The block is about to lose its shared memory.
void check_nothing_left(const Block& block) {
  for (const Copies* copies : {&loads, &stores}) {
    for (int i = 0; i < copies->count; ++i) {
      const Copy& copy = copies->list[i];
      if (copy.block != &block) continue;
      fail(copy.place, "%s: on its way when its block ended, nobody waited for it",
           copies == &loads ? kLoad : kStore);
    }
  }
}

void forget_copies() { loads.count = stores.count = storers = 0; }

const bool registered =
    (on_idle(load_one), on_end(check_nothing_left), on_residence(forget_copies), true);

const Map& checked_map(const CUtensorMap& map, int rank, const char* what, Place place) {
  const auto& inner = *reinterpret_cast<const Map*>(&map);
  if (reinterpret_cast<uintptr_t>(&map) % 64 || inner.mark != kMark) {
    fail(place, "%s: the map must come from cuTensorMapEncodeTiled and be 64-byte aligned", what);
  }
  if (rank && inner.rank != rank) {
    fail(place, "%s: the map has %d dimensions, got %d", what, inner.rank, rank);
  }
  return inner;
}

Copy prepared(const CUtensorMap& map, const void* shared, const int* at, int rank, const char* what,
              Place place) {
  Copy copy{};
  copy.map = checked_map(map, rank, what, place);
  for (int i = 0; i < rank; ++i) copy.at[i] = at[i];
  copy.offset = shared_offset(shared, place);
  copy.block = machine.current->block;
  copy.thread = machine.current;
  copy.place = place;
  if (copy.offset % 128) {
    fail(place, "%s: the box must be 128-byte aligned in shared memory, got offset %u", what,
         copy.offset);
  }
  if (copy.map.swizzle && copy.map.row_bytes() != kPiece * copy.map.pieces()) {
    fail(place, "%s: not emulated, a box whose rows of %u bytes do not fill the swizzle's %u", what,
         copy.map.row_bytes(), kPiece * copy.map.pieces());
  }
  check_shared_range(copy.offset, copy.map.bytes(), what, place);
  return copy;
}

}  // namespace

void load_box(void* to, const CUtensorMap& map, uint64_t* barrier, const int* at, int rank,
              Place place) {
  Copy copy = prepared(map, to, at, rank, kLoad, place);
  copy.barrier = barrier;
  shared_offset(barrier, place);
  check_barrier(barrier, kLoad, place);
  for_rows(copy.map, copy.at, [&](uint32_t, const char* from, int64_t, int64_t bytes) {
    check_read(from, static_cast<size_t>(bytes), kLoad, place);
    check_written(from, static_cast<size_t>(bytes), kLoad, place);
  });
  check_write(to, copy.map.bytes(), kLoad, place);
  poison_shared(*copy.block, copy.offset, copy.map.bytes());
  release(barrier_tag(barrier));
  loads.add(copy);
}

void store_box(const CUtensorMap& map, const void* from, const int* at, int rank, Place place) {
  Copy copy = prepared(map, from, at, rank, kStore, place);
  copy.group = groups_of(copy.thread).committed;
  check_read(from, copy.map.bytes(), kStore, place);
  for_elements(copy, [&](uint32_t at) { check_published(at, copy.map.element, kStore, place); });
  for_rows(copy.map, copy.at, [&](uint32_t, char* to, int64_t, int64_t bytes) {
    check_write(to, static_cast<size_t>(bytes), kStore, place);
    mark(to, static_cast<size_t>(bytes), Written::yes);
  });
  stores.add(copy);
}

void bulk_wait(int pending, bool, Place) {
  const int done = groups_of(machine.current).committed - pending;
  for (int i = 0; i < stores.count;) {
    if (stores.list[i].thread == machine.current && stores.list[i].group < done) {
      execute_store(stores.list[i]);
      stores.remove(i);
    } else {
      ++i;
    }
  }
}

void check_map(const CUtensorMap& map, int rank, Place place) {
  checked_map(map, rank, "prefetch.tensormap", place);
}

}  // namespace tilewise::emulation

namespace tilewise {

void fence_async() { emulation::publish(*emulation::machine.current->block); }
void bulk_commit() { ++emulation::groups_of(emulation::machine.current).committed; }

}  // namespace tilewise

// How many maps were made, for tests in Python, which find it by this name in the module.
extern "C" {
[[gnu::visibility("default")]] std::atomic<int64_t> tilewise_tensor_maps_made{0};
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using tilewise::emulation::kMaxRank;
  using tilewise::emulation::kPiece;
  constexpr int kElements[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (!map || !base || reinterpret_cast<uintptr_t>(base) % 16 || rank < 1 || rank > kMaxRank) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  tilewise::emulation::Map made{};
  made.mark = tilewise::emulation::kMark;
  made.base = static_cast<char*>(base);
  made.rank = static_cast<uint8_t>(rank);
  made.element = static_cast<uint8_t>(kElements[type]);
  made.swizzle = static_cast<uint8_t>(swizzle);
  for (cuuint32_t i = 0; i < rank; ++i) {
    const bool bad_stride = i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= cuuint64_t{1} << 40);
    if (!sizes[i] || sizes[i] > cuuint64_t{1} << 32 || !box[i] || box[i] > 256 || steps[i] != 1 ||
        bad_stride) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    made.sizes[i] = sizes[i];
    made.box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) made.strides[i - 1] = strides[i - 1];
  }
  const uint32_t row = made.row_bytes();
  if (row % kPiece || (swizzle && row > kPiece * made.pieces())) return CUDA_ERROR_INVALID_VALUE;
  new (map) tilewise::emulation::Map(made);
  ++tilewise_tensor_maps_made;
  return CUDA_SUCCESS;
}
