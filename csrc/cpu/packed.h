// Runs a call of packed sequences sequence by sequence, on all threads. Included by dispatch.cpp.
#pragma once

#include "../core/sequence.h"
#include "kernels.h"

namespace torch_attn::cpu {

inline bool is_packed(const AttentionProblem& p) { return p.query_starts != nullptr || p.key_starts != nullptr; }

// Calls run(sequence, parallel) once for each batch entry. A long sequence, which would leave other threads idle at the
// end, has all threads to itself; of the others each thread takes the next, the costliest first.
void for_each_sequence(const AttentionProblem& problem, const Parallel& parallel,
                       void (*run)(void* context, const Sequence&, const Parallel&), void* context);

template <class Run>
void for_each_sequence(const AttentionProblem& problem, const Parallel& parallel, const Run& run) {
  for_each_sequence(
      problem, parallel,
      [](void* context, const Sequence& sequence, const Parallel& inner) {
        (*static_cast<const Run*>(context))(sequence, inner);
      },
      const_cast<void*>(static_cast<const void*>(&run)));
}

}  // namespace torch_attn::cpu
