// A timer of the host thread's own processor time interrupts it. When it finds the same turn of the
// same CUDA thread often enough, the launch fails where that thread is, and the fiber is left for
// good: kernels hold nothing that others would miss. TILEWISE_EMULATION_PATIENCE says after how
// many seconds; 0 is never. ThreadSanitizer holds signals back, so its build has no watchdog.
#include "emulation/watchdog.h"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "emulation/machine.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace tilewise::emulation {
namespace {

constexpr double kPatience = 20;  // seconds
#if defined(TILEWISE_THREAD)
constexpr bool kIsHeldBack = true;  // a signal, until it is too late
#else
constexpr bool kIsHeldBack = false;
#endif
constexpr int kTicks = 4;  // of the timer in this time
constexpr size_t kStack = 64 * 1024;

double patience;
uint64_t last_turn;
int ticks;                                    // in which that turn has lasted
alignas(16) thread_local char stack[kStack];  // a fiber's own may be full

double read_patience() {
  const char* asked = std::getenv("TILEWISE_EMULATION_PATIENCE");
  if (!asked || !*asked) return kPatience;
  char* end;
  const double seconds = std::strtod(asked, &end);
  if (*end || !(seconds >= 0) || std::isinf(seconds)) {
    throw std::runtime_error(std::string("TILEWISE_EMULATION_PATIENCE: must be a number of "
                                         "seconds, got ") +
                             asked);
  }
  return seconds;
}

int signal_number() { return SIGRTMIN + 5; }

Trace interrupted(const ucontext_t& context) {
#if defined(__x86_64__)
  const auto& registers = context.uc_mcontext.gregs;
  return trace_from(reinterpret_cast<const void*>(registers[REG_RIP]),
                    reinterpret_cast<const void*>(registers[REG_RBP]));
#elif defined(__aarch64__)
  return trace_from(reinterpret_cast<const void*>(context.uc_mcontext.pc),
                    reinterpret_cast<const void*>(context.uc_mcontext.regs[29]));
#else
  static_cast<void>(context);
  return {};
#endif
}

void tick(int, siginfo_t*, void* context) {
  if (!machine.on_fiber) return;
  if (machine.turns != last_turn) {
    last_turn = machine.turns;
    ticks = 0;
  }
  if (++ticks <= kTicks) return;
  fail_in(
      interrupted(*static_cast<const ucontext_t*>(context)),
      "hangs: has let no other thread run for %g seconds; loops on plain or volatile memory do, "
      "unless built with \"memory\"",
      patience);
}

}  // namespace

Watchdog::Watchdog() {
  patience = read_patience();
  last_turn = 0;
  ticks = 0;
  if (patience == 0 || kIsHeldBack) return;
  stack_t others;
  if (sigaltstack(nullptr, &others) == 0 && others.ss_flags & SS_DISABLE) {
    stack_t own{};
    own.ss_sp = stack;
    own.ss_size = kStack;
    sigaltstack(&own, nullptr);
  }
  struct sigaction action{};
  action.sa_sigaction = tick;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = signal_number();
  event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  if (sigaction(signal_number(), &action, &before_)) return;
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_)) {
    sigaction(signal_number(), &before_, nullptr);
    return;
  }
  watches_ = true;
  const double every = patience / kTicks;
  timespec period{};
  period.tv_sec = static_cast<time_t>(every);
  period.tv_nsec = static_cast<long>((every - static_cast<double>(period.tv_sec)) * 1e9);
  const itimerspec times{period, period};
  timer_settime(timer_, 0, &times, nullptr);
}

Watchdog::~Watchdog() {
  if (!watches_) return;
  timer_delete(timer_);
  sigaction(signal_number(), &before_, nullptr);
}

}  // namespace tilewise::emulation
