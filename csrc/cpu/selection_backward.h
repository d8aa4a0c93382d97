// Hard attention's backward pass: backward.h's walk with selection_gradient_tile.h's tiles. Included by
// instantiate/selection_*.cpp.
#pragma once

#include "backward.h"
#include "selection_gradient_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Real>
void select_keys_backward_as(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                             const Parallel& parallel) {
  using Tile = SelectionGradientTile<Real>;
  if (tensors.grad_attn_mask.defined()) mask_gradient<BackwardScores<Tile>>(problem, tensors, parallel);
  backward_with<VectorWalk<Tile>>(problem, tensors, parallel);
}

inline void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                                 const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    select_keys_backward_as<double>(problem, tensors, parallel);
  } else {
    select_keys_backward_as<float>(problem, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
