#include "ops/composite/formula.h"

#include <ATen/ops/matmul.h>

#include "ops/check.h"
#include "ops/composite/weights.h"
#include "ops/operators.h"
#include "ops/outputs.h"

namespace torch_attn::ops::composite {

ForwardResult attention_forward(const ForwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Tensor rng_state = rng_state_of(a);
  const Weights w = compute_weights(a, rng_state);
  const Tensor out = at::matmul(w.drop(w.weights), w.value);
  return {by_row(out, a.query.scalar_type()), w.logsumexp.squeeze(-1), rng_state};
}

BackwardResult attention_backward(const BackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const ForwardArguments forward = a.forward();
  const Weights w = compute_weights(forward, a.rng_state);
  const Sizes& s = w.sizes;
  const Tensor grad_out = a.grad_out.to(w.query.scalar_type());

  // With W = kept · P: grad P = kept · (grad_out Vᵀ); softmax: grad S = P · (grad P - rowsum(P · grad P)); and
  // d logsumexp / d S = P.
  const Tensor grad_weights = w.drop(at::matmul(grad_out, w.value.transpose(-2, -1)));
  Tensor row_term = (w.weights * grad_weights).sum(-1, /*keepdim=*/true);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - a.grad_logsumexp->unsqueeze(-1).masked_fill(w.is_empty, 0);
  const Tensor grad_scores = w.weights * (grad_weights - row_term);

  auto r = gradients_of_inputs(w, grad_scores, forward, a.output_mask);
  if (a.output_mask[kValue])
    r[kValue] =
        by_row(sum_kv_heads(at::matmul(w.drop(w.weights).transpose(-2, -1), grad_out), s), a.query.scalar_type());
  if (a.output_mask[kSinks])
    r[kSinks] = per_head_gradient((w.sink_weights * row_term).sum({2, 3}).neg(), *a.options.sinks);
  for (size_t i = 0; i < kGradients; ++i)
    if (!a.output_mask[i]) r[i] = no_gradient(a.query);
  return {r[kQuery], r[kKey], r[kValue], r[kAttnMask], r[kAlibiSlopes], r[kSinks]};
}

Tensor dropout_keep_mask(const DropoutArguments& a) {
  DropoutArguments on_cpu = a;
  on_cpu.rng_state = a.rng_state.cpu();
  return DropoutKeepMask::call(on_cpu).to(a.rng_state.device());
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask>);
}

}  // namespace torch_attn::ops::composite
