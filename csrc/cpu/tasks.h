// Runs numbered pieces of work on the caller's threads. Included by forward.h, backward.h and mask_gradient.h.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Calls body(item, scratch) once for every item in [0, count). Each thread takes the next item when it has finished
// one, so items of unequal cost (causal rows) balance; scratch starts empty for each item.
template <class Body>
void for_each_item(const Parallel& parallel, int64_t count, const Body& body) {
  if (count <= 0) return;
  struct Queue {
    const Body& body;
    int64_t count;
    int64_t next;
  } queue{body, count, 0};
  const int64_t workers = smaller<int64_t>(parallel.threads < 1 ? 1 : parallel.threads, count);
  if (workers == 1) {  // without the shared counter, which waits for the last item's stores to land
    for (int64_t item = 0; item < count; ++item) {
      Scratch scratch;
      body(item, scratch);
    }
    return;
  }
  const auto work = [](void* context, int64_t) {
    Queue& shared = *static_cast<Queue*>(context);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
      if (item >= shared.count) return;
      Scratch scratch;
      shared.body(item, scratch);
    }
  };
  parallel.run(parallel.context, workers, work, &queue);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
