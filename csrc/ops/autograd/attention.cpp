// Differentiation of attention_forward, by an autograd::Function whose backward is an operator of its own and, in
// forward mode, by the operator attention_jvp.
#include "ops/autograd/saved_call.h"
#include "ops/autograd/tangents.h"
#include "ops/outputs.h"

namespace torch_attn::ops {
namespace {

class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static variable_list forward(AutogradContext* context, at::TensorList, const ForwardArguments* arguments,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    auto [out, logsumexp, rng_state] = AttentionForward::call(*arguments);
    context->set_materialize_grads(false);
    const Inputs inputs = inputs_of(*arguments);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(), {out, logsumexp, rng_state});
    append_indices(saved, arguments->options);
    context->save_for_backward(std::move(saved));
    save_options(*context, arguments->options);
    return {out, logsumexp, rng_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &out = saved[6], &grad_out = gradients[0], &grad_logsumexp = gradients[1];
    BackwardArguments arguments{grad_out,
                                or_none(grad_logsumexp),
                                saved[kQuery],
                                saved[kKey],
                                saved[kValue],
                                out,
                                saved[7],
                                saved[8],
                                saved_options(*context, saved, saved.begin() + 9)};
    Edges edges(*context);
    for (size_t i = 0; i < kGradients; ++i) arguments.output_mask[i] = edges.next_is_wanted(saved[i]);

    variable_list results(edges.count() + kOtherArguments);
    if (!grad_out.defined() && !grad_logsumexp.defined()) return results;
    if (!grad_out.defined()) arguments.grad_out = at::zeros_like(out);
    // Through the dispatcher, whose Autograd kernel knows whether this backward is itself differentiated.
    const auto computed = as_array(AttentionBackward::call(arguments));
    for (size_t i = 0, edge = 0; i < kGradients; ++i) {
      if (!saved[i].defined()) continue;
      if (arguments.output_mask[i]) results[edge] = computed[i];
      ++edge;
    }
    return results;
  }
};

ForwardResult attention_forward_autograd(const ForwardArguments& a) {
  const Inputs inputs = inputs_of(a);
  const auto any = [&](auto&& predicate) { return std::any_of(inputs.begin(), inputs.end(), predicate); };
  const bool is_differentiated = at::GradMode::is_enabled() && any(requires_grad);
  TORCH_CHECK(!is_paged(a.options) || !(is_differentiated || any(has_tangent)),
              "attention: keys in pages (block_table) have no derivatives, but an input requires grad; call it under "
              "torch.no_grad().");
  if (any(has_tangent)) return forward_with_tangents(a);
  if (is_differentiated) {
    const variable_list results = apply<ForwardFunction>(present(inputs), a);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionForward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_autograd>);
}

}  // namespace torch_attn::ops
