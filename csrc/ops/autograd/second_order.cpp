// Differentiation of the derivatives: attention_backward and attention_jvp.
//
// Both are derivatives of phi(x) = <grad_out, out(x)> + <grad_logsumexp, logsumexp(x)>, where x are the inputs.
// backward gives its gradient, B(x). For cotangents u of B's results, <B(x), u> is phi's derivative along u, so that
//   its gradient with respect to grad_out and grad_logsumexp is attention_jvp's tangent along u, and
//   its gradient with respect to x is the tangent of B along u: attention_backward_jvp.
// attention_jvp is linear in its tangents: their gradient is attention_backward of the tangents' cotangents, and that
// of x is again attention_backward_jvp. All second derivatives are thus fused; third ones go through the composite
// formula.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include "ops/autograd/saved_call.h"
#include "ops/autograd/tangents.h"
#include "ops/composite/formula.h"

namespace torch_attn::ops {
namespace {

Tensor or_zeros(const Tensor& t, const Tensor& like) { return t.defined() ? t : at::zeros_like(like); }

bool any(const OutputMask& mask) {
  return std::any_of(mask.begin(), mask.end(), [](bool b) { return b; });
}

class BackwardFunction : public torch::autograd::Function<BackwardFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const BackwardArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto results = as_array(AttentionBackward::call(*a));
    context->set_materialize_grads(false);
    const Inputs inputs = inputs_of(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(),
                 {a->out.detach(), a->logsumexp.detach(), a->rng_state, a->grad_out, or_undefined(a->grad_logsumexp)});
    append_indices(saved, a->options);
    context->save_for_backward(std::move(saved));
    save_options(*context, a->options);
    return {results.begin(), results.end()};
  }

  static variable_list backward(AutogradContext* context, const variable_list& cotangents) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &grad_out = saved[9], &grad_logsumexp = saved[10];
    Edges edges(*context);
    edges.next_is_wanted(grad_out);
    edges.next_is_wanted(grad_logsumexp);
    const size_t first_input = edges.count();
    OutputMask wanted;
    for (size_t i = 0; i < kGradients; ++i) wanted[i] = edges.next_is_wanted(saved[i]);
    variable_list results(edges.count() + kOtherArguments);

    const Tangents along = as_tangents(cotangents);
    if (present(inputs_of(along)).empty()) return results;
    const Options options = saved_options(*context, saved, saved.begin() + 11);
    const auto [out, logsumexp, tangent_out, tangent_logsumexp] =
        AttentionJvp::call({saved[kQuery], saved[kKey], saved[kValue], saved[8], along, options});
    results[0] = tangent_out;
    if (grad_logsumexp.defined()) results[1] = tangent_logsumexp;
    if (!any(wanted)) return results;
    const auto gradients = as_array(AttentionBackwardJvp::call(
        {grad_out, or_none(grad_logsumexp), saved[kQuery], saved[kKey], saved[kValue], saved[6], saved[7], saved[8],
         tangent_out, tangent_logsumexp, std::nullopt, std::nullopt, along, options, wanted}));
    for (size_t i = 0, edge = first_input; i < kGradients; ++i) {
      if (!saved[i].defined()) continue;
      if (wanted[i]) results[edge] = gradients[i];
      ++edge;
    }
    return results;
  }
};

BackwardResult attention_backward_autograd(const BackwardArguments& a) {
  const Inputs inputs = inputs_of(a);
  const std::array<Tensor, 2> gradients = {a.grad_out, or_undefined(a.grad_logsumexp)};
  const auto any_holds = [&](auto&& predicate) {
    return std::any_of(inputs.begin(), inputs.end(), predicate) ||
           std::any_of(gradients.begin(), gradients.end(), predicate);
  };
  const bool is_differentiated = at::GradMode::is_enabled() && any_holds(requires_grad);
  if (any_holds(has_tangent)) return is_differentiated ? composite::attention_backward(a) : backward_with_tangents(a);
  if (is_differentiated) {
    const auto r = apply<BackwardFunction>(present(gradients, inputs), a);
    return {r[0], r[1], r[2], r[3], r[4], r[5]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionBackward::call(a);
}

class JvpFunction : public torch::autograd::Function<JvpFunction> {
 public:
  static constexpr bool is_traceable = true;

  struct Arguments {
    const JvpArguments& jvp;
    const Inputs& saved_inputs;
  };

  static variable_list forward(AutogradContext* context, at::TensorList, const Arguments* arguments,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const JvpArguments* a = &arguments->jvp;
    const auto results = as_array(AttentionJvp::call(*a));
    context->set_materialize_grads(false);
    const Inputs &inputs = arguments->saved_inputs, tangents = inputs_of(a->tangents);
    variable_list saved(inputs.begin(), inputs.end());
    saved.push_back(a->rng_state);
    saved.insert(saved.end(), results.begin(), results.end());
    saved.insert(saved.end(), tangents.begin(), tangents.end());
    append_indices(saved, a->options);
    context->save_for_backward(std::move(saved));
    save_options(*context, a->options);
    return {results.begin(), results.end()};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const auto first_tangent_input = saved.begin() + 11, indices = first_tangent_input + kGradients;
    const variable_list tangents(first_tangent_input, indices);
    Edges edges(*context);
    OutputMask inputs_wanted, tangents_wanted;
    for (size_t i = 0; i < kGradients; ++i) inputs_wanted[i] = edges.next_is_wanted(saved[i]);
    const size_t first_tangent = edges.count();
    for (size_t i = 0; i < kGradients; ++i) tangents_wanted[i] = edges.next_is_wanted(tangents[i]);
    variable_list results(edges.count() + kOtherArguments);

    const Tensor &out = saved[7], &logsumexp = saved[8];
    const Options options = saved_options(*context, saved, indices);
    const auto add = [&](const variable_list& slots, size_t edge, const OutputMask& wanted,
                         const BackwardResult& computed) {
      const auto values = as_array(computed);
      for (size_t i = 0; i < kGradients; ++i) {
        if (!slots[i].defined()) continue;
        if (wanted[i]) results[edge] = results[edge].defined() ? results[edge] + values[i] : values[i];
        ++edge;
      }
    };
    const auto backward_of = [&](const Tensor& grad_out, const Tensor& grad_logsumexp, const OutputMask& wanted) {
      return AttentionBackward::call({or_zeros(grad_out, out), or_none(grad_logsumexp), saved[kQuery], saved[kKey],
                                      saved[kValue], out, logsumexp, saved[6], options, wanted});
    };
    if ((gradients[0].defined() || gradients[1].defined()) && any(inputs_wanted))
      add(saved, 0, inputs_wanted, backward_of(gradients[0], gradients[1], inputs_wanted));
    if (gradients[2].defined() || gradients[3].defined()) {
      if (any(tangents_wanted))
        add(tangents, first_tangent, tangents_wanted, backward_of(gradients[2], gradients[3], tangents_wanted));
      if (any(inputs_wanted))
        add(saved, 0, inputs_wanted,
            AttentionBackwardJvp::call({or_zeros(gradients[2], out), or_none(gradients[3]), saved[kQuery], saved[kKey],
                                        saved[kValue], out, logsumexp, saved[6], saved[9], saved[10], std::nullopt,
                                        std::nullopt, as_tangents(tangents), options, inputs_wanted}));
    }
    return results;
  }
};

JvpResult attention_jvp_autograd(const JvpArguments& a) {
  const Inputs inputs = inputs_of(a), tangents = inputs_of(a.tangents);
  const bool has_tangents = std::any_of(inputs.begin(), inputs.end(), has_tangent) ||
                            std::any_of(tangents.begin(), tangents.end(), has_tangent);
  return has_tangents ? composite::attention_jvp(a) : differentiable_jvp(a, inputs);
}

// Third derivatives. Forward is fused, as torch.func records every derivative whether or not it is differentiated
// again; backward evaluates the composite formula anew and differentiates that.
class BackwardJvpFunction : public torch::autograd::Function<BackwardJvpFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const BackwardJvpArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto results = as_array(AttentionBackwardJvp::call(*a));
    context->set_materialize_grads(false);
    const auto inputs = differentiable(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(), {a->out.detach(), a->logsumexp.detach(), a->rng_state, a->tangent_out.detach(),
                               a->tangent_logsumexp.detach()});
    append_indices(saved, a->options);
    context->save_for_backward(std::move(saved));
    save_options(*context, a->options);
    c10::List<bool> wanted;
    for (const bool b : a->output_mask) wanted.push_back(b);
    context->saved_data["output_mask"] = wanted;
    return {results.begin(), results.end()};
  }

  static variable_list backward(AutogradContext* context, const variable_list& cotangents) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode enabled(true);
    variable_list saved = context->get_saved_variables();
    Edges edges(*context);
    variable_list inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < kInputs; ++i) {
      const size_t edge = edges.count();
      if (!edges.next_is_wanted(saved[i])) continue;
      saved[i] = saved[i].view_as(saved[i]);  // the gradient of this evaluation's input, not of what lies before it
      inputs.push_back(saved[i]);
      places.push_back(edge);
    }
    variable_list results(edges.count() + kOtherArguments);

    const variable_list primals(saved.begin() + 2, saved.begin() + 8),
        tangents(saved.begin() + 10, saved.begin() + kInputs);
    const auto& fixed = saved.begin() + kInputs;
    BackwardJvpArguments a{saved[0],
                           or_none(saved[1]),
                           primals[kQuery],
                           primals[kKey],
                           primals[kValue],
                           fixed[0],
                           fixed[1],
                           fixed[2],
                           fixed[3],
                           fixed[4],
                           or_none(saved[8]),
                           or_none(saved[9]),
                           as_tangents(tangents),
                           saved_options(*context, primals, fixed + 5)};
    const c10::List<bool> wanted = context->saved_data["output_mask"].toBoolList();
    for (size_t i = 0; i < kGradients; ++i) a.output_mask[i] = wanted[i];
    const auto outputs = as_array(composite::attention_backward_jvp(a));

    variable_list differentiated, along;
    for (size_t i = 0; i < kGradients; ++i) {
      if (!cotangents[i].defined() || !outputs[i].requires_grad()) continue;
      differentiated.push_back(outputs[i]);
      along.push_back(cotangents[i]);
    }
    if (differentiated.empty() || inputs.empty()) return results;
    const variable_list gradients =
        torch::autograd::grad(differentiated, inputs, along, std::nullopt, create_graph, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) results[places[i]] = gradients[i];
    return results;
  }

  static constexpr size_t kInputs = 4 + 2 * kGradients;

  static std::array<Tensor, kInputs> differentiable(const BackwardJvpArguments& a) {
    std::array<Tensor, kInputs> r = {a.grad_out, or_undefined(a.grad_logsumexp)};
    const Inputs inputs = inputs_of(a), tangents = inputs_of(a.tangents);
    std::copy(inputs.begin(), inputs.end(), r.begin() + 2);
    r[8] = or_undefined(a.tangent_grad_out);
    r[9] = or_undefined(a.tangent_grad_logsumexp);
    std::copy(tangents.begin(), tangents.end(), r.begin() + 10);
    return r;
  }
};

BackwardResult attention_backward_jvp_autograd(const BackwardJvpArguments& a) {
  const auto inputs = BackwardJvpFunction::differentiable(a);
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent)) return composite::attention_backward_jvp(a);
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad)) {
    const auto r = apply<BackwardJvpFunction>(present(inputs), a);
    return {r[0], r[1], r[2], r[3], r[4], r[5]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionBackwardJvp::call(a);
}

}  // namespace

JvpResult differentiable_jvp(const JvpArguments& a, const Inputs& saved_inputs) {
  const Inputs inputs = inputs_of(a), tangents = inputs_of(a.tangents);
  if (at::GradMode::is_enabled() && (std::any_of(inputs.begin(), inputs.end(), requires_grad) ||
                                     std::any_of(tangents.begin(), tangents.end(), requires_grad))) {
    const auto r = apply<JvpFunction>(present(inputs, tangents), JvpFunction::Arguments{a, saved_inputs});
    return {r[0], r[1], r[2], r[3]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionJvp::call(a);
}

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_autograd>);
  m.impl("attention_jvp", AttentionJvp::kernel<attention_jvp_autograd>);
  m.impl("attention_backward_jvp", AttentionBackwardJvp::kernel<attention_backward_jvp_autograd>);
}

}  // namespace torch_attn::ops
