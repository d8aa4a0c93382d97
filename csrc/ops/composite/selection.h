// select_keys and its backward in ATen operators: differentiable to any order, for whatever the fused kernels do not
// serve. Keeps the (L, S) matrix.
#pragma once

#include "ops/selection.h"

namespace torch_attn::ops::composite {

SelectResult select_keys(const SelectArguments& arguments);

// What select_keys returns beside indices and rng_state, as functions of query, key and the options, for keys that have
// been chosen.
struct Evaluation {
  Tensor scores, log_prob;    // (B, Hq, L, count)
  Tensor entropy, logsumexp;  // (B, Hq, L)
};
Evaluation evaluate_selection(const SelectArguments& arguments, const Tensor& indices);

// A function of the gradients and of the forward's inputs; the saved entropy and logsumexp are not read, so that
// derivatives of it see everything those depend on.
SelectBackwardResult select_keys_backward(const SelectBackwardArguments& arguments);

}  // namespace torch_attn::ops::composite
