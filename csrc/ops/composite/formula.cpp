#include "ops/composite/formula.h"

#include <ATen/ops/matmul.h>

#include "ops/check.h"
#include "ops/composite/weights.h"
#include "ops/operators.h"
#include "ops/packed.h"

namespace torch_attn::ops::composite {

ForwardResult attention_forward(const ForwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Tensor rng_state = rng_state_of(a);
  const Weights w = compute_weights(a, rng_state);
  const Tensor out = at::matmul(w.drop(w.weights), w.value);
  return {by_row(out, a.query.scalar_type()), w.logsumexp.squeeze(-1), rng_state};
}

BackwardResult gradients_of_scores(const Weights& w, const Tensor& grad_scores, const Tensor& grad_sink,
                                   const Options& o, const OutputMask& output_mask) {
  const auto wanted = [&](Gradient gradient, auto&& compute) {
    return output_mask[gradient] ? compute() : at::empty({0}, w.query.options().dtype(w.dtype));
  };
  Tensor grad_dots;
  if (output_mask[kQuery] || output_mask[kKey]) {
    grad_dots = grad_scores * w.scale;
    if (w.softcap > 0) grad_dots = grad_dots * at::rsub((w.capped / w.softcap).square(), 1);
  }
  return {
      wanted(kQuery, [&] { return by_row(at::matmul(grad_dots, w.key), w.dtype); }),
      wanted(kKey,
             [&] { return by_row(sum_kv_heads(at::matmul(grad_dots.transpose(-2, -1), w.query), w.sizes), w.dtype); }),
      at::empty({0}, w.query.options().dtype(w.dtype)),
      wanted(kAttnMask, [&] { return sum_to(grad_scores, *o.attn_mask); }),
      wanted(kAlibiSlopes, [&] { return sum_of_rows((grad_scores * w.minus_distance).sum(-1), *o.alibi_slopes, o); }),
      wanted(kSinks, [&] { return sum_of_rows(grad_sink.squeeze(-1), *o.sinks, o); }),
  };
}

BackwardResult attention_backward(const BackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const ForwardArguments forward = a.forward();
  const Weights w = compute_weights(forward, a.rng_state);
  const Tensor grad_out = a.grad_out.to(w.query.scalar_type());

  // With W = kept · P: grad P = kept · (grad_out Vᵀ); softmax: grad S = P · (grad P - rowsum(P · grad P)); and
  // d logsumexp / d S = P.
  const Tensor grad_weights = w.drop(at::matmul(grad_out, w.value.transpose(-2, -1)));
  Tensor row_term = (w.weights * grad_weights).sum(-1, /*keepdim=*/true);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - a.grad_logsumexp->unsqueeze(-1).masked_fill(w.is_empty, 0);
  const Tensor grad_scores = w.weights * (grad_weights - row_term);

  BackwardResult result = gradients_of_scores(w, grad_scores, w.sink_gradient(row_term), a.options, a.output_mask);
  if (a.output_mask[kValue])
    std::get<kValue>(result) =
        by_row(sum_kv_heads(at::matmul(w.drop(w.weights).transpose(-2, -1), grad_out), w.sizes), a.query.scalar_type());
  return result;
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
