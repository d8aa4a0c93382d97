// Differentiation of gather_values: its backward is the fused gather_values_backward. Forward mode and the derivatives
// of backward differentiate the composite formula, which costs as much but keeps the gathered rows.
#include "ops/composite/gather.h"
#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {
namespace {

class GatherFunction : public torch::autograd::Function<GatherFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const GatherArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const Tensor out = GatherValues::call(*a);
    context->set_materialize_grads(false);
    context->save_for_backward({a->value, or_undefined(a->weights), a->indices});
    return {out};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    Edges edges(*context);
    const std::array<bool, 2> wanted = {edges.next_is_wanted(saved[0]), edges.next_is_wanted(saved[1])};
    variable_list results(edges.count() + kOtherArguments);
    if (!gradients[0].defined()) return results;
    const auto [grad_value, grad_weights] =
        GatherValuesBackward::call({gradients[0], saved[0], saved[2], or_none(saved[1]), wanted});
    if (wanted[0]) results[0] = grad_value;
    if (wanted[1]) results[1] = grad_weights;
    return results;
  }
};

Tensor gather_values_autograd(const GatherArguments& a) {
  const std::array<Tensor, 2> inputs = {a.value, or_undefined(a.weights)};
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent)) return composite::gather_values(a);
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad))
    return apply<GatherFunction>(present(inputs), a)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return GatherValues::call(a);
}

GatherBackwardResult gather_values_backward_autograd(const GatherBackwardArguments& a) {
  const std::array<Tensor, 3> inputs = {a.grad_out, a.value, or_undefined(a.weights)};
  const bool differentiated = at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad);
  if (differentiated || std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return composite::gather_values_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return GatherValuesBackward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_autograd>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward_autograd>);
}

}  // namespace torch_attn::ops
