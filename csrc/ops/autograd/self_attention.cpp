// First derivatives of self_attention as one tensor; whatever else is differentiated goes by attention's own.
#include "ops/self_attention.h"

#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {
namespace {

class SelfAttentionFunction : public torch::autograd::Function<SelfAttentionFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const SelfAttentionArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const Tensor& qkv = a->qkv;
    const auto [out, logsumexp, rng_state] = AttentionForward::call(
        {part_of(qkv, kQuery), part_of(qkv, kKey), part_of(qkv, kValue), Options{a->options}, std::nullopt});
    context->set_materialize_grads(false);
    const CallOptions& o = a->options;
    context->save_for_backward({qkv, out, logsumexp, or_undefined(o.attn_mask), or_undefined(o.alibi_slopes),
                                or_undefined(o.sinks), rng_state, or_undefined(o.key_lengths)});
    save_options(*context, o);
    return {out};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list results(1 + kOtherArguments);
    if (!gradients[0].defined()) return results;
    const variable_list saved = context->get_saved_variables();
    static_assert(kAttnMask == 3 && kAlibiSlopes == 4 && kSinks == 5);  // where saved_options finds them
    results[0] = SelfAttentionBackward::call(
        {gradients[0], saved[0], saved[1], saved[2], saved[6], saved_options(*context, saved, saved[7])});
    return results;
  }
};

// Whether the gradient of qkv is all that is asked for.
bool has_plain_gradient(const SelfAttentionArguments& a) {
  const std::array<Tensor, 3> others = {or_undefined(a.options.attn_mask), or_undefined(a.options.alibi_slopes),
                                        or_undefined(a.options.sinks)};
  const auto is_differentiated = [](const Tensor& t) { return requires_grad(t) || has_tangent(t); };
  return at::GradMode::is_enabled() && a.qkv.requires_grad() && !has_tangent(a.qkv) &&
         std::none_of(others.begin(), others.end(), is_differentiated);
}

Tensor self_attention_autograd(const SelfAttentionArguments& a) {
  // Masks of fewer dimensions are attention's to bring to four.
  const bool is_canonical = !is_defined(a.options.attn_mask) || a.options.attn_mask->dim() == 4;
  if (!is_canonical || !has_plain_gradient(a)) return composite::self_attention(a);
  check_qkv(a.qkv);
  return apply<SelfAttentionFunction>({a.qkv}, a)[0];
}

Tensor self_attention_backward_autograd(const SelfAttentionBackwardArguments& a) {
  const std::array<Tensor, 5> inputs = {a.grad_out, a.qkv, or_undefined(a.options.attn_mask),
                                        or_undefined(a.options.alibi_slopes), or_undefined(a.options.sinks)};
  const bool is_differentiated =
      (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad)) ||
      std::any_of(inputs.begin(), inputs.end(), has_tangent);
  if (is_differentiated) return composite::self_attention_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return SelfAttentionBackward::call(a);
}

}  // namespace

// Of the devices that have kernels alone: others, which find the composite, have no self_attention_backward.
TORCH_LIBRARY_IMPL(torch_attn, AutogradCPU, m) {
  m.impl("self_attention", SelfAttention::kernel<self_attention_autograd>);
}
TORCH_LIBRARY_IMPL(torch_attn, AutogradCUDA, m) {
  m.impl("self_attention", SelfAttention::kernel<self_attention_autograd>);
}
TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("self_attention_backward", SelfAttentionBackward::kernel<self_attention_backward_autograd>);
}

}  // namespace torch_attn::ops
