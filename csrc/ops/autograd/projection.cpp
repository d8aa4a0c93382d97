// First derivatives of torch_attn::projection, where the CPU's kernel takes the call; all others are those of
// at::linear.
#include "ops/projection.h"

#include <algorithm>
#include <array>

#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {
namespace {

class ProjectionFunction : public torch::autograd::Function<ProjectionFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const ProjectionArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    context->set_materialize_grads(false);
    context->saved_data["inputs"] = is_defined(a->bias) ? 3 : 2;
    context->save_for_backward(
        {a->weight.requires_grad() ? a->input : Tensor(), a->input.requires_grad() ? a->weight : Tensor()});
    return {Projection::call(*a)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto inputs = static_cast<size_t>(context->saved_data["inputs"].toInt());
    variable_list results(inputs + kOtherArguments);
    if (!gradients[0].defined()) return results;
    const variable_list saved = context->get_saved_variables();
    std::array<bool, 3> wanted = {};
    for (size_t i = 0; i < inputs; ++i) wanted[i] = context->needs_input_grad(i);
    const auto computed =
        as_array(ProjectionBackward::call({gradients[0], or_none(saved[0]), or_none(saved[1]), wanted}));
    for (size_t i = 0; i < inputs; ++i) {
      if (wanted[i]) results[i] = computed[i];
    }
    return results;
  }
};

template <class Range>
bool is_differentiated(const Range& tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), requires_grad);
}

Tensor projection_autograd(const ProjectionArguments& a) {
  const std::array<Tensor, 3> inputs = {a.input, a.weight, or_undefined(a.bias)};
  if (!has_projection_kernel(a) || std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return composite::projection(a);
  if (is_differentiated(inputs)) return apply<ProjectionFunction>(present(inputs), a)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Projection::call(a);
}

ProjectionGradients projection_backward_autograd(const ProjectionBackwardArguments& a) {
  const std::array<Tensor, 3> inputs = {a.grad_out, or_undefined(a.input), or_undefined(a.weight)};
  if (is_differentiated(inputs) || std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return composite::projection_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ProjectionBackward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, AutogradCPU, m) {
  m.impl("projection", Projection::kernel<projection_autograd>);
  m.impl("projection_backward", ProjectionBackward::kernel<projection_backward_autograd>);
}

}  // namespace torch_attn::ops
