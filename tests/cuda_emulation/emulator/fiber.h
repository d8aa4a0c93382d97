// A stack of its own and a way to switch to it: what the scheduler runs a CUDA thread on. About 5 ns a switch.
#pragma once

#include <cstddef>

namespace emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)());  // the next switch to this fiber calls entry, which must never return
  bool holds(const void* address) const;

  // Suspends `from` and resumes `to`; a null pointer names the thread's own stack. `from_ends` promises that `from` is
  // never resumed before its next start().
  static void switch_between(Fiber* from, Fiber* to, bool from_ends = false);

  // First call of an entry function, so that AddressSanitizer knows which stack is in use.
  static void entered(Fiber* fiber);

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  char* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* sanitizer_state_ = nullptr;
};

}  // namespace emulation
