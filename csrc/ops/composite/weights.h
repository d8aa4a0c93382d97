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
  Tensor query, key, value;
  c10::Scalar scale;
  double softcap = 0;
  Tensor capped;  // softcap(scale · q·k)
  Tensor minus_distance;
  Tensor logits;        // what the softmax is taken of, the sink's column at the end; 0 in empty rows
  Tensor weights;       // the softmax; 0 in empty rows
  Tensor sink_weights;  // (B, Hq, L, 1): the sink's share; undefined without sinks
  Tensor kept;          // what dropout multiplies the weights by; undefined without dropout
  Tensor logsumexp;     // (B, Hq, L, 1)
  Tensor is_empty;      // (B, Hq, L, 1): no key is attended and no sink is there

  Tensor drop(const Tensor& t) const { return kept.defined() ? t * kept : t; }
};

// The arguments must have been checked.
Weights compute_weights(const ForwardArguments& arguments, const Tensor& rng_state);

// Each query head's own key or value head: (B, Hkv, S, D) -> (B, Hq, S, D); and its transpose.
Tensor expand_kv_heads(const Tensor& tensor, const Sizes& sizes);
Tensor sum_kv_heads(const Tensor& tensor, const Sizes& sizes);

// (Hq) or (B, Hq) to (1 or B, Hq, 1, 1).
Tensor per_head(const Tensor& tensor, at::ScalarType type);

// To the dtype and the layout that outputs.h's empty_by_row gives.
Tensor by_row(const Tensor& tensor, at::ScalarType type);

// The inputs' gradients that flow through the scores, from those of the scores (B, Hq, L, S): what the wanted ones
// among query, key, attn_mask and alibi_slopes have in common in every operator. The others are left undefined.
std::array<Tensor, kGradients> gradients_of_inputs(const Weights& weights, const Tensor& grad_scores,
                                                   const ForwardArguments& arguments, const OutputMask& wanted);

// The sum of tensor over the dimensions that like was broadcast in, in like's dtype.
Tensor sum_to(const Tensor& tensor, const Tensor& like);

}  // namespace torch_attn::ops::composite
