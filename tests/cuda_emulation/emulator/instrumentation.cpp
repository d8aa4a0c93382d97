// The kernels are compiled with -fsanitize=thread, which makes the compiler report every load and store to the
// functions below; ThreadSanitizer itself is not linked, they hand the access to memory.h's checks instead.
#include <cstddef>

#include "memory.h"
#include "scheduler.h"

namespace {

// Outside a launch the host runs: nothing to check.
inline void read(const void* address, size_t bytes) {
  if (emulation::current) emulation::check_read(address, bytes, "a load");
}
inline void write(const void* address, size_t bytes) {
  if (emulation::current) emulation::check_write(address, bytes, "a store");
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) { read(address, bytes); }
void __tsan_write_range(void* address, size_t bytes) { write(address, bytes); }

#define ACCESS_OF(BYTES)                                                     \
  void __tsan_read##BYTES(void* address) { read(address, BYTES); }           \
  void __tsan_write##BYTES(void* address) { write(address, BYTES); }         \
  void __tsan_unaligned_read##BYTES(void* address) { read(address, BYTES); } \
  void __tsan_unaligned_write##BYTES(void* address) { write(address, BYTES); }
ACCESS_OF(1)
ACCESS_OF(2)
ACCESS_OF(4)
ACCESS_OF(8)
ACCESS_OF(16)
#undef ACCESS_OF
}
