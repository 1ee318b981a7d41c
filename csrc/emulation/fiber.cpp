#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(TILEWISE_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(TILEWISE_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

// tilewise_switch(from, to): push what a call must keep, store the stack pointer in *from, take
// the one in `to`, and pop. Where there is no such code, ucontext does it, a system call slower.
extern "C" void tilewise_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.hidden tilewise_switch
.globl tilewise_switch
.type tilewise_switch, @function
tilewise_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tilewise_switch, .-tilewise_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden tilewise_switch
.globl tilewise_switch
.type tilewise_switch, %function
tilewise_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size tilewise_switch, .-tilewise_switch
)");
#else
#include <ucontext.h>
extern "C" void tilewise_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
#endif

namespace tilewise::emulation {
namespace {

constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size there is
constexpr size_t kPoisonedBytes = 4096;    // of a stack, so that locals begin as NaN

void* host_stack_pointer;
[[maybe_unused]] void* host_fake_stack;
[[maybe_unused]] const void* host_stack;
[[maybe_unused]] size_t host_stack_bytes;
[[maybe_unused]] void* host_sanitized;

// Of threads that ended. ThreadSanitizer gives the identity of a destroyed one to a new one, and
// takes both for the same thread, so a launch keeps them for a while: its clocks grow with them.
std::vector<void*> identities;
[[maybe_unused]] constexpr size_t kMaxIdentities = 1024;

// What tilewise_switch pops when it first switches to a fiber with this stack.
void* first_frame(char* stack, void (*entry)()) {
  auto top = reinterpret_cast<void**>(stack + kStackBytes - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // who called entry: nobody
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
#elif defined(__aarch64__)
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[1] = reinterpret_cast<void*>(entry);
  return top;
#else
  auto context = new (reinterpret_cast<char*>(top) - sizeof(ucontext_t)) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = reinterpret_cast<char*>(context) - stack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
#endif
}

}  // namespace

Stacks::~Stacks() { unmap(); }

void Stacks::unmap() {
  if (memory_) munmap(memory_, count_ * (kGuardBytes + kStackBytes));
  memory_ = nullptr;
}

char* Stacks::stack(int i) const { return memory_ + i * (kGuardBytes + kStackBytes) + kGuardBytes; }

void Stacks::prepare(int count) {
#if defined(TILEWISE_THREAD)
  const bool reuse = false;  // ThreadSanitizer remembers who wrote there
#else
  const bool reuse = count <= count_;
#endif
  if (!reuse || !memory_) {
    unmap();
    count_ = count;
    void* memory = mmap(nullptr, count * (kGuardBytes + kStackBytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
#if !defined(TILEWISE_THREAD)  // for which it would be too slow
    for (int i = 0; i < count; ++i) mprotect(stack(i) - kGuardBytes, kGuardBytes, PROT_NONE);
#endif
  }
  for (int i = 0; i < count; ++i) {
#if defined(TILEWISE_ADDRESS)
    __asan_unpoison_memory_region(stack(i), kStackBytes);
#endif
    std::memset(stack(i) + kStackBytes - kPoisonedBytes, 0xFF, kPoisonedBytes);
  }
}

void create(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_pointer = first_frame(stack, entry);
#if defined(TILEWISE_THREAD)
  fiber.sanitized = __tsan_create_fiber(0);
#endif
}

void destroy([[maybe_unused]] Fiber& fiber, [[maybe_unused]] const void* end) {
#if defined(TILEWISE_ADDRESS)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#elif defined(TILEWISE_THREAD)
  void* host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.sanitized, __tsan_switch_to_fiber_no_sync);
  __tsan_release(const_cast<void*>(end));
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
  identities.push_back(fiber.sanitized);
  if (identities.size() == kMaxIdentities) destroy_identities();
#endif
}

void destroy_identities() {
#if defined(TILEWISE_THREAD)
  for (void* identity : identities) __tsan_destroy_fiber(identity);
#endif
  identities.clear();
}

void enter(Fiber& fiber) {
#if defined(TILEWISE_ADDRESS)
  __sanitizer_start_switch_fiber(&host_fake_stack, fiber.stack, kStackBytes);
#elif defined(TILEWISE_THREAD)
  host_sanitized = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.sanitized, __tsan_switch_to_fiber_no_sync);
#endif
  tilewise_switch(&host_stack_pointer, fiber.stack_pointer);
#if defined(TILEWISE_ADDRESS)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
}

void leave(Fiber& fiber, [[maybe_unused]] bool last) {
#if defined(TILEWISE_ADDRESS)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, host_stack, host_stack_bytes);
#elif defined(TILEWISE_THREAD)
  __tsan_switch_to_fiber(host_sanitized, __tsan_switch_to_fiber_no_sync);
#endif
  tilewise_switch(&fiber.stack_pointer, host_stack_pointer);
#if defined(TILEWISE_ADDRESS)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &host_stack, &host_stack_bytes);
#endif
}

void arrived() {
#if defined(TILEWISE_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
}

}  // namespace tilewise::emulation
