// Differentiation of select_keys: its backward is the fused select_keys_backward. Forward mode and the derivatives of
// backward differentiate the composite formula.
#include <torch/csrc/autograd/autograd.h>

#include "ops/autograd/saved_call.h"
#include "ops/composite/selection.h"

namespace torch_attn::ops {
namespace {

template <class Arguments>
Inputs inputs_without_value(const Arguments& a) {
  const ScoreOptions& o = a.options;
  return {a.query, a.key, Tensor(), or_undefined(o.attn_mask), or_undefined(o.alibi_slopes), or_undefined(o.sinks)};
}

constexpr size_t kScores = 1, kLogProb = 2, kEntropy = 3, kLogsumexp = 4;  // of SelectResult

class SelectFunction : public torch::autograd::Function<SelectFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const SelectArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto results = as_array(SelectKeys::call(*a));
    context->set_materialize_grads(false);
    const Inputs inputs = inputs_without_value(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(),
                 {or_undefined(a->options.key_lengths), results[0], results[kEntropy], results[kLogsumexp]});
    context->save_for_backward(std::move(saved));
    save_options(*context, a->options.options());
    return {results.begin(), results.end()};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    SelectBackwardArguments a{or_none(gradients[kScores]),
                              or_none(gradients[kLogProb]),
                              or_none(gradients[kEntropy]),
                              or_none(gradients[kLogsumexp]),
                              saved[kQuery],
                              saved[kKey],
                              saved[7],
                              saved[8],
                              saved[9],
                              ScoreOptions::of(saved_options(*context, saved, saved[6]))};
    Edges edges(*context);
    for (size_t i = 0; i < kSelectGradients.size(); ++i)
      a.output_mask[i] = edges.next_is_wanted(saved[kSelectGradients[i]]);
    variable_list results(edges.count() + kOtherArguments);
    if (!a.any_gradient()) return results;
    const auto computed = as_array(SelectKeysBackward::call(a));
    for (size_t i = 0, edge = 0; i < kSelectGradients.size(); ++i) {
      if (!saved[kSelectGradients[i]].defined()) continue;
      if (a.output_mask[i]) results[edge] = computed[i];
      ++edge;
    }
    return results;
  }
};

SelectResult as_result(const variable_list& r) { return {r[0], r[1], r[2], r[3], r[4], r[5]}; }

// The keys are chosen without tangents; what is a function of the inputs then gets them from the formula.
SelectResult select_with_tangents(const SelectArguments& a) {
  auto [indices, scores, log_prob, entropy, logsumexp, rng_state] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return SelectKeys::call(a);
  }();
  const composite::Evaluation e = composite::evaluate_selection(a, indices);
  return {indices, e.scores, e.log_prob, e.entropy, e.logsumexp, rng_state};
}

SelectResult select_keys_autograd(const SelectArguments& a) {
  const Inputs inputs = inputs_without_value(a);
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent)) return select_with_tangents(a);
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad))
    return as_result(apply<SelectFunction>(present(inputs), a));
  const at::AutoDispatchBelowADInplaceOrView guard;
  return SelectKeys::call(a);
}

// Forward is fused, as torch.func records every derivative whether or not it is differentiated again; backward
// evaluates the composite formula anew and differentiates that.
class SelectBackwardFunction : public torch::autograd::Function<SelectBackwardFunction> {
 public:
  static constexpr bool is_traceable = true;
  static constexpr size_t kGiven = 4;  // gradients, before the inputs

  static std::array<Tensor, kGiven + kGradients> differentiable(const SelectBackwardArguments& a) {
    std::array<Tensor, kGiven + kGradients> all = {or_undefined(a.grad_scores), or_undefined(a.grad_log_prob),
                                                   or_undefined(a.grad_entropy), or_undefined(a.grad_logsumexp)};
    const Inputs inputs = inputs_without_value(a);
    std::copy(inputs.begin(), inputs.end(), all.begin() + kGiven);
    return all;
  }

  static variable_list forward(AutogradContext* context, at::TensorList, const SelectBackwardArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto results = as_array(SelectKeysBackward::call(*a));
    context->set_materialize_grads(false);
    const auto inputs = differentiable(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(),
                 {or_undefined(a->options.key_lengths), a->indices, a->entropy.detach(), a->logsumexp.detach()});
    context->save_for_backward(std::move(saved));
    save_options(*context, a->options.options());
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
    for (size_t i = 0; i < kGiven + kGradients; ++i) {
      const size_t edge = edges.count();
      if (!edges.next_is_wanted(saved[i])) continue;
      saved[i] = saved[i].view_as(saved[i]);  // the gradient of this evaluation's input, not of what lies before it
      inputs.push_back(saved[i]);
      places.push_back(edge);
    }
    variable_list results(edges.count() + kOtherArguments);

    const variable_list primals(saved.begin() + kGiven, saved.begin() + kGiven + kGradients);
    const auto fixed = saved.begin() + kGiven + kGradients;
    SelectBackwardArguments a{or_none(saved[0]), or_none(saved[1]),
                              or_none(saved[2]), or_none(saved[3]),
                              primals[kQuery],   primals[kKey],
                              fixed[1],          fixed[2],
                              fixed[3],          ScoreOptions::of(saved_options(*context, primals, fixed[0]))};
    const c10::List<bool> wanted = context->saved_data["output_mask"].toBoolList();
    for (size_t i = 0; i < kSelectGradients.size(); ++i) a.output_mask[i] = wanted[i];
    const auto outputs = as_array(composite::select_keys_backward(a));

    variable_list differentiated, along;
    for (size_t i = 0; i < outputs.size(); ++i) {
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
};

SelectBackwardResult select_keys_backward_autograd(const SelectBackwardArguments& a) {
  const auto inputs = SelectBackwardFunction::differentiable(a);
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent)) return composite::select_keys_backward(a);
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad)) {
    const auto r = apply<SelectBackwardFunction>(present(inputs), a);
    return {r[0], r[1], r[2], r[3], r[4]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return SelectKeysBackward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("select_keys", SelectKeys::kernel<select_keys_autograd>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward_autograd>);
}

}  // namespace torch_attn::ops
