// The attention weights and what they are made of, as ATen operators: the base of formula.cpp and tangent.cpp, which
// differentiate them by formula and leave what is beyond to autograd. Keeps the (L, S) matrix.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/arguments.h"

namespace torch_attn::ops::composite {

// matmul and others must run in the accumulator type, whatever autocast says.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Everything between the inputs and out, in the accumulator type and with Hq heads.
struct Weights {
  Sizes sizes;
  at::ScalarType dtype = at::kFloat;  // the inputs' own
  Tensor query, key, value;
  c10::Scalar scale;
  double softcap = 0;
  Tensor capped;  // softcap(scale · q·k)
  Tensor scores;  // with ALiBi and mask; −inf where a key is not attended
  Tensor minus_distance;
  Tensor logits;        // what the softmax is taken of, the sink's column at the end; 0 in empty rows
  Tensor weights;       // the softmax; 0 in empty rows
  Tensor sink_weights;  // (B, Hq, L, 1): the sink's share; undefined without sinks
  Tensor kept;          // what dropout multiplies the weights by; undefined without dropout
  Tensor logsumexp;     // (B, Hq, L, 1)
  Tensor is_empty;      // (B, Hq, L, 1): no key is attended and no sink is there

  // A sink's gradient from what a row's softmax subtracts from its weights' gradients, (B, Hq, L, 1).
  Tensor sink_gradient(const Tensor& row_term) const {
    return sink_weights.defined() ? (sink_weights * row_term).neg() : Tensor();
  }
  Tensor drop(const Tensor& t) const { return kept.defined() ? t * kept : t; }
};

// The arguments must have been checked. rng_state is read only if there is dropout.
Weights compute_weights(const ForwardArguments& arguments, const Tensor& rng_state, const SelectedRows& selected = {});

// From the gradient of the scores, and of a sink's (B, Hq, L, 1), to those of all they are made of; value's is empty.
BackwardResult gradients_of_scores(const Weights& weights, const Tensor& grad_scores, const Tensor& grad_sink,
                                   const Options& options, const OutputMask& output_mask);

// Each query head's own key or value head: (B, Hkv, S, D) -> (B, Hq, S, D); and its transpose.
Tensor expand_kv_heads(const Tensor& tensor, const Sizes& sizes);
Tensor sum_kv_heads(const Tensor& tensor, const Sizes& sizes);

// (Hq) or (B, Hq) to (1 or B, Hq, 1, 1) or, of packed sequences, (1, Hq, L, 1), in the accumulator type.
Tensor per_head(const Tensor& tensor, const Weights& weights, const Options& options);

// To the dtype and the layout that outputs.h's empty_by_row gives.
Tensor by_row(const Tensor& tensor, at::ScalarType type);

// The sum of tensor over the dimensions that like was broadcast in, in like's dtype.
Tensor sum_to(const Tensor& tensor, const Tensor& like);

}  // namespace torch_attn::ops::composite
