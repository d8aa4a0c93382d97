// Shapes, dtypes and layouts without data: what torch.compile, torch.export and FakeTensor ask for.
#include <ATen/ops/empty_like.h>

#include "ops/check.h"
#include "ops/operators.h"
#include "ops/outputs.h"
#include "ops/self_attention.h"

namespace torch_attn::ops {
namespace {

ForwardResult attention_forward_meta(const ForwardArguments& a) {
  check_arguments(a);
  const Sizes s = Sizes::of(a);
  const auto options = a.query.options();
  return {empty_by_row(s.batch, s.heads, s.query_length, s.value_dim, options),
          at::empty_symint({s.batch, s.heads, s.query_length}, options.dtype(accumulator_type(a.query.scalar_type()))),
          at::empty({kRngStateSize}, options.dtype(at::kLong))};
}

JvpResult attention_jvp_meta(const JvpArguments& a) {
  check_arguments(a);
  const auto [out, logsumexp, rng_state] = attention_forward_meta(a.forward());
  return {out, logsumexp, empty_by_row_like(out), at::empty_symint(logsumexp.sym_sizes(), logsumexp.options())};
}

template <class Arguments>
BackwardResult gradients_meta(const Arguments& a) {
  check_arguments(a);
  const auto by_row = [&](Gradient gradient, const Tensor& input) {
    return a.output_mask[gradient] ? empty_by_row_like(input) : no_gradient(a.query);
  };
  const auto contiguous = [&](Gradient gradient, const OptionalTensor& input) {
    return a.output_mask[gradient] ? at::empty_symint(input->sym_sizes(), input->options()) : no_gradient(a.query);
  };
  return {by_row(kQuery, a.query),
          by_row(kKey, a.key),
          by_row(kValue, a.value),
          contiguous(kAttnMask, a.options.attn_mask),
          contiguous(kAlibiSlopes, a.options.alibi_slopes),
          contiguous(kSinks, a.options.sinks)};
}

Tensor self_attention_backward_meta(const SelfAttentionBackwardArguments& a) {
  check_arguments(a.separate());
  return at::empty_like(a.qkv);
}

Tensor dropout_keep_mask_meta(const DropoutArguments& a) {
  check_arguments(a);
  return at::empty_symint({a.batch, a.heads, a.query_length, a.key_length}, a.rng_state.options().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Meta, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_meta>);
  m.impl("attention_backward", AttentionBackward::kernel<gradients_meta<BackwardArguments>>);
  m.impl("self_attention_backward", SelfAttentionBackward::kernel<self_attention_backward_meta>);
  m.impl("attention_jvp", AttentionJvp::kernel<attention_jvp_meta>);
  m.impl("attention_backward_jvp", AttentionBackwardJvp::kernel<gradients_meta<BackwardJvpArguments>>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask_meta>);
}

}  // namespace torch_attn::ops
