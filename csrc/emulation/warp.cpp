// Where the lanes of a warp meet.
#include "emulation/machine.h"

namespace tilewise::emulation {
namespace {

constexpr int kWarpTags = 2 * kNamedBarriers;  // those of the barriers come before

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.rank / kLanes]; }

Thread* thread_at(const Thread& thread, int lane) {
  return &thread.block->threads[thread.rank / kLanes * kLanes + lane];
}

void complete_if_all_came(Meeting& meeting, const Warp& warp, const Thread& last) {
  if (meeting.complete || (meeting.mask & warp.alive & ~meeting.arrived)) return;
  meeting.complete = true;
  meeting.inside = meeting.arrived;
  for (int lane = 0; lane < kLanes; ++lane) {
    Thread* thread = meeting.arrived >> lane & 1 ? thread_at(last, lane) : nullptr;
    if (thread && thread != &last) make_ready(thread);
  }
}

// The open meeting of these lanes, else a new one.
Meeting& join(Warp& warp, int lane, unsigned mask, const char* what, Place place, bool anywhere) {
  Meeting* free = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (!meeting.mask) {
      if (!free) free = &meeting;
    } else if (meeting.mask == mask && !meeting.complete) {
      if (meeting.what != what || !(anywhere || same(meeting.place, place))) {
        fail(place, "%s: divergent, lanes %08x of mask %08x wait for lane %d in %s at %s:%d (%s)",
             what, meeting.arrived, mask, lane, meeting.what, meeting.place.file,
             meeting.place.line, meeting.place.function);
      }
      return meeting;
    }
  }
  free->mask = mask;
  free->arrived = 0;
  free->complete = false;
  free->what = what;
  free->place = place;
  return *free;
}

}  // namespace

unsigned exchange(unsigned mask, uint64_t value, uint64_t (&values)[kLanes], bool ordered,
                  const char* what, Place place) {
  Thread& me = *machine.current;
  Warp& warp = warp_of(me);
  const int lane = me.rank % kLanes;
  if (!(mask >> lane & 1)) fail(place, "%s: lane %d is not in its mask %08x", what, lane, mask);
  Meeting& meeting = join(warp, lane, mask, what, place, ordered);
  const void* name = tag(*me.block, kWarpTags + me.rank / kLanes * (kLanes + 1) +
                                        static_cast<int>(&meeting - warp.meetings));
  if (ordered) release(name);
  meeting.values[lane] = value;
  meeting.arrived |= 1u << lane;
  complete_if_all_came(meeting, warp, me);
  if (!meeting.complete) suspend({what, place, mask});
  if (ordered) acquire(name);
  const unsigned came = meeting.arrived;
  for (int i = 0; i < kLanes; ++i) values[i] = meeting.values[i];
  meeting.inside &= ~(1u << lane);
  if (!meeting.inside) meeting.mask = 0;
  return came;
}

void leave_warp(Thread& thread) {
  Warp& warp = warp_of(thread);
  warp.alive &= ~(1u << thread.rank % kLanes);
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask && meeting.arrived) complete_if_all_came(meeting, warp, thread);
  }
}

}  // namespace tilewise::emulation
