// Hard attention's backward pass: backward_tasks.h's walk with selection_gradient_tile.h's tiles. Included by
// instantiate/selection_*.cpp.
#pragma once

#include "backward_tasks.h"
#include "selection_gradient_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

inline void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                                 const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    backward_as<SelectionGradientTile<double>>(problem, tensors, parallel);
  } else {
    backward_as<SelectionGradientTile<float>>(problem, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
