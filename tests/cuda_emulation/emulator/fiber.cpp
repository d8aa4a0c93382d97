// Fibers for x86-64: the callee-saved registers are pushed on one stack and popped from the other.
#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "The emulator switches stacks in x86-64 assembly; write emulation_switch_stack for this processor."
#endif

extern "C" void emulation_switch_stack(void** saved_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl emulation_switch_stack
.type emulation_switch_stack, @function
emulation_switch_stack:
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
.size emulation_switch_stack, .-emulation_switch_stack
)");

namespace emulation {
namespace {

constexpr size_t kGuardBytes = 4096;  // below the stack: an overflow faults at once

struct MainStack {
  void* stack_pointer = nullptr;
  void* sanitizer_state = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
} main_stack;

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

bool Fiber::holds(const void* address) const {
  const char* a = static_cast<const char*>(address);
  return stack_ <= a && a < stack_ + kStackBytes;
}

void Fiber::start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // entry's return address: it never returns, and this keeps its stack aligned
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedRegisters;
  std::memset(top, 0, kSavedRegisters * sizeof(void*));
  stack_pointer_ = top;
  sanitizer_state_ = nullptr;
}

void Fiber::entered([[maybe_unused]] Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fiber ? fiber->sanitizer_state_ : main_stack.sanitizer_state, &bottom, &bytes);
  if (fiber && !main_stack.bottom) {  // the first fiber learns where the thread's own stack is
    main_stack.bottom = bottom;
    main_stack.bytes = bytes;
  }
#endif
}

void Fiber::switch_between(Fiber* from, Fiber* to, [[maybe_unused]] bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
  void** state = from ? &from->sanitizer_state_ : &main_stack.sanitizer_state;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : state, to ? to->stack_ : main_stack.bottom,
                                 to ? kStackBytes : main_stack.bytes);
#endif
  emulation_switch_stack(from ? &from->stack_pointer_ : &main_stack.stack_pointer,
                         to ? to->stack_pointer_ : main_stack.stack_pointer);
  entered(from);
}

}  // namespace emulation
