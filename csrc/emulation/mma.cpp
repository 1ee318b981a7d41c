// cp.async, ldmatrix and mma.sync. A copy poisons its destination and is executed when its own
// thread waits for it.
#include "emulation/late.h"
#include "emulation/written.h"
// These redefine words that the C++ library uses, and come after it.
#include "cuda/mma.cuh"

namespace tilewise::emulation {
namespace {

constexpr int kMaxCopies = 1 << 16;  // on their way, of all threads
constexpr int kNone = -1;
constexpr int kMaxThreads = 16 * kMaxBlockThreads;

constexpr const char* kCopy = "cp.async";

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  int group;
  int next;  // of the same thread, or of those that are free
};

struct Queue {
  int first, last;
  int committed;
};

Copy copies[kMaxCopies];
int used, freed;  // how many were ever in use, and the first that is not any longer
Queue queues[kMaxThreads];

void forget_copies() {
  used = 0;
  freed = kNone;
  for (Queue& queue : queues) queue = {kNone, kNone, 0};
}

const bool registered = (on_residence(forget_copies), true);

Queue& mine() {
  const Thread& me = *machine.current;
  return queues[me.block->cluster_rank * kMaxBlockThreads + me.rank];
}

int take(Place place) {
  if (freed != kNone) {
    const int i = freed;
    freed = copies[i].next;
    return i;
  }
  if (used == kMaxCopies) fail(place, "%s: not emulated, more than %d at once", kCopy, kMaxCopies);
  return used++;
}

void execute(const Copy& copy) {
  alignas(16) char buffer[16] = {};
  copy_bytes(buffer, copy.from, static_cast<size_t>(copy.valid));
  copy_bytes(copy.to, buffer, static_cast<size_t>(copy.bytes));
  mark(copy.to, static_cast<size_t>(copy.bytes), Written::yes);
}

float to_number(uint32_t pair, int which, MmaType type) {
  const auto bits = static_cast<uint16_t>(pair >> which * 16);
  return type == MmaType::bf16 ? __uint_as_float(uint32_t{bits} << 16)
                               : __half2float(__ushort_as_half(bits));
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int valid, Place place) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fail(place, "%s: both addresses must be %d-byte aligned, got %p and %p", kCopy, bytes, to,
         from);
  }
  if (valid < 0 || valid > bytes) {
    fail(place, "%s: 0 to %d bytes can be read, got %d", kCopy, bytes, valid);
  }
  check_shared_range(shared_offset(to, place), bytes, kCopy, place);
  check_read(from, static_cast<size_t>(valid), kCopy, place);
  check_written(from, static_cast<size_t>(valid), kCopy, place);
  check_write(to, bytes, kCopy, place);
  poison_bytes(to, bytes);
  mark(to, bytes, Written::on_its_way);
  Queue& queue = mine();
  const int i = take(place);
  copies[i] = {to, from, bytes, valid, queue.committed, kNone};
  (queue.first == kNone ? queue.first : copies[queue.last].next) = i;
  queue.last = i;
}

void copy_async_wait(int pending, Place) {
  Queue& queue = mine();
  while (queue.first != kNone && copies[queue.first].group < queue.committed - pending) {
    const int i = queue.first;
    execute(copies[i]);
    queue.first = copies[i].next;
    copies[i].next = freed;
    freed = i;
  }
}

void load_matrices(uint32_t* out, int count, bool transposed, const void* row, Place place) {
  constexpr const char* kWhat = "ldmatrix";
  uint64_t halves[2] = {};
  if (lane() < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) {
      fail(place, "%s: a row must be 16-byte aligned, got %p", kWhat, row);
    }
    check_shared_range(shared_offset(row, place), 16, kWhat, place);
    check_read(row, 16, kWhat, place);
    check_written(row, 16, kWhat, place);
    copy_bytes(halves, row, sizeof halves);
  }
  uint64_t low[kLanes], high[kLanes];
  exchange(~0u, halves[0], low, false, kWhat, place);
  exchange(~0u, halves[1], high, false, kWhat, place);
  const auto element = [&](int matrix, int r, int c) {
    const uint64_t half = (c < 4 ? low : high)[8 * matrix + r];
    return static_cast<uint32_t>(half >> c % 4 * 16 & 0xFFFF);
  };
  const int g = lane() / 4, t = lane() % 4 * 2;
  for (int i = 0; i < count; ++i) {
    out[i] = transposed ? element(i, t, g) | element(i, t + 1, g) << 16
                        : element(i, g, t) | element(i, g, t + 1) << 16;
  }
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaType type, Place place) {
  constexpr const char* kWhat = "mma.sync";
  uint64_t upper[kLanes], lower[kLanes], columns[kLanes];  // rows below 8, and from 8 on
  exchange(~0u, a[0] | uint64_t{a[2]} << 32, upper, false, kWhat, place);
  exchange(~0u, a[1] | uint64_t{a[3]} << 32, lower, false, kWhat, place);
  exchange(~0u, b[0] | uint64_t{b[1]} << 32, columns, false, kWhat, place);
  // Register i of 4 lanes: of K 4 numbers (tf32), or 8 in pairs.
  const auto number = [&](uint64_t registers, int i, int which) {
    const auto bits = static_cast<uint32_t>(registers >> 32 * i);
    return type == MmaType::tf32 ? __uint_as_float(bits & 0xffffe000)
                                 : to_number(bits, which, type);
  };
  const int g = lane() / 4, t = lane() % 4 * 2;
  const int each = type == MmaType::tf32 ? 1 : 2;
  for (int i = 0; i < 4; ++i) {
    const uint64_t* rows = (i < 2 ? upper : lower) + 4 * g;
    const uint64_t* cols = columns + 4 * (t + i % 2);
    float sum = 0.f;
    for (int k = 0; k < 8 * each; ++k) {
      const int from = k / each % 4, half = k / each / 4, which = k % each;
      sum += number(rows[from], half, which) * number(cols[from], half, which);
    }
    d[i] += sum;
  }
}

}  // namespace tilewise::emulation

namespace tilewise {

void copy_async_commit() { ++emulation::mine().committed; }

}  // namespace tilewise
