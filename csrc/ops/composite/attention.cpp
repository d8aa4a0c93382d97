// torch_attn::attention and attention_with_logsumexp: what users call, by attention_forward.
#include "ops/composite/canonical.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

Tensor attention(const AttentionArguments& a) {
  const Canonical canonical(a);
  return canonical.restore(std::get<0>(AttentionForward::call(canonical.arguments())));
}

std::tuple<Tensor, Tensor> attention_with_logsumexp(const AttentionArguments& a) {
  const Canonical canonical(a);
  const auto [out, logsumexp, rng_state] = AttentionForward::call(canonical.arguments());
  return {canonical.restore(out), canonical.restore(logsumexp)};
}

Tensor scaled_dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                    std::optional<double> scale, bool enable_gqa) {
  CallOptions options;
  options.attn_mask = attn_mask;
  options.dropout_p = dropout_p;
  options.is_causal = is_causal;
  options.scale = scale;
  return attention({query, key, value, options, enable_gqa});
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) {
  m.impl("attention", Attention::kernel<attention>);
  m.impl("attention_with_logsumexp", AttentionWithLogsumexp::kernel<attention_with_logsumexp>);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
}
// vmap: the alias above does not cover it.
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("attention", Attention::kernel<attention>);
  m.impl("attention_with_logsumexp", AttentionWithLogsumexp::kernel<attention_with_logsumexp>);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
}

}  // namespace torch_attn::ops
