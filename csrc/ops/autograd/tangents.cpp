#include "ops/autograd/tangents.h"

#include <ATen/ops/zeros_like.h>

#include "ops/outputs.h"

namespace torch_attn::ops {
namespace {

constexpr int64_t kLevel = 0;  // PyTorch has only this one; torch.func nests by wrapping tensors

Tensor primal(const Tensor& t) { return t.defined() ? t._fw_primal(kLevel) : t; }
OptionalTensor primal(const OptionalTensor& t) { return is_defined(t) ? OptionalTensor(primal(*t)) : t; }
OptionalTensor tangent(const Tensor& t) { return t.defined() ? or_none(t._fw_grad(kLevel)) : std::nullopt; }
OptionalTensor tangent(const OptionalTensor& t) { return is_defined(t) ? tangent(*t) : std::nullopt; }

void set_tangent(const Tensor& result, const Tensor& tangent) {
  result._set_fw_grad(tangent, kLevel, /*is_inplace_op=*/false);
}

Options primal(const Options& options) {
  Options o = options;
  o.attn_mask = primal(o.attn_mask);
  o.alibi_slopes = primal(o.alibi_slopes);
  o.sinks = primal(o.sinks);
  return o;
}

template <class Arguments>
Tangents tangents_of(const Arguments& a) {
  Inputs tangents = inputs_of(a);
  for (Tensor& t : tangents) t = or_undefined(tangent(t));
  return as_tangents(tangents);
}

}  // namespace

ForwardResult forward_with_tangents(const ForwardArguments& a) {
  const Tensor rng_state = rng_state_of(a);
  const JvpArguments jvp{primal(a.query), primal(a.key), primal(a.value), rng_state, tangents_of(a), primal(a.options)};
  const auto [out, logsumexp, tangent_out, tangent_logsumexp] = differentiable_jvp(jvp, inputs_of(a));
  set_tangent(out, tangent_out);
  set_tangent(logsumexp, tangent_logsumexp);
  return {out, logsumexp, rng_state};
}

BackwardResult backward_with_tangents(const BackwardArguments& a) {
  const BackwardArguments p{
      primal(a.grad_out), primal(a.grad_logsumexp), primal(a.query), primal(a.key),     primal(a.value),
      primal(a.out),      primal(a.logsumexp),      a.rng_state,     primal(a.options), a.output_mask};
  const BackwardResult gradients = AttentionBackward::call(p);

  // The gradients' tangents. Where only grad_out and grad_logsumexp have tangents, backward itself, which is linear in
  // these, gives them.
  const Tangents tangents = tangents_of(a);
  OptionalTensor tangent_grad_out = tangent(a.grad_out), tangent_grad_logsumexp = tangent(a.grad_logsumexp);
  BackwardResult result;
  if (present(inputs_of(tangents)).empty()) {
    BackwardArguments linear = p;
    linear.grad_out = is_defined(tangent_grad_out) ? *tangent_grad_out : at::zeros_like(p.out);
    linear.grad_logsumexp = tangent_grad_logsumexp;
    result = AttentionBackward::call(linear);
  } else {
    const auto jvp = AttentionJvp::call({p.query, p.key, p.value, p.rng_state, tangents, p.options});
    result = AttentionBackwardJvp::call({p.grad_out, p.grad_logsumexp, p.query, p.key, p.value, p.out, p.logsumexp,
                                         p.rng_state, std::get<2>(jvp), std::get<3>(jvp), tangent_grad_out,
                                         tangent_grad_logsumexp, tangents, p.options, p.output_mask});
  }
  const auto results = as_array(gradients), result_tangents = as_array(result);
  for (size_t i = 0; i < kGradients; ++i)
    if (a.output_mask[i]) set_tangent(results[i], result_tangents[i]);
  return gradients;
}

}  // namespace torch_attn::ops
