// The backward pass on vectors; see backward_tasks.h. Included by instantiate/*.cpp.
#pragma once

#include "backward_tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

inline void attention_backward(const AttentionProblem& problem, const BackwardTensors& tensors,
                               const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    backward_as<GradientTile<double>>(problem, tensors, parallel);
  } else {
    backward_as<GradientTile<float>>(problem, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
