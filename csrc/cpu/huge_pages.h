// Large memory in pages of 2 MiB instead of 4 KiB. The kernel hands out fresh memory page by page, and the first write
// to each is a trap: for 4 KiB pages that costs three times what filling them does. Included by scratch.cpp and
// ops/cpu/maps.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_attn::cpu {

constexpr size_t kHugePage = size_t{1} << 21;

// Advice only, for memory that is about to be written whole: where the system has none (transparent_hugepage "never",
// or another system) nothing changes.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace torch_attn::cpu
