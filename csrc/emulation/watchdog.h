// Ends a launch in which a thread never lets others run: a loop on memory that only another thread
// would change, or one that has no end.
#pragma once

#include <signal.h>
#include <time.h>

namespace tilewise::emulation {

// Watches a launch of this thread of the host as long as it lives.
class Watchdog {
 public:
  Watchdog();
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;

 private:
  bool watches_ = false;
  timer_t timer_;
  struct sigaction before_;
};

}  // namespace tilewise::emulation
