// Differentiation of the operators on attention maps: first derivatives by their fused backward operators, all others
// (forward mode, derivatives of a backward) by the composite formulas, which ordinary autograd differentiates.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "ops/autograd/saved_call.h"
#include "ops/composite/map_formula.h"
#include "ops/map_operators.h"

namespace torch_attn::ops {
namespace {

// The inputs that may have a gradient, in the order of enum MapGradient.
using MapInputs = std::array<Tensor, kMapGradients>;

template <class Arguments>
MapInputs map_inputs(const Arguments& a) {
  const ScoreOptions& o = a.options;
  return {a.query, a.key, or_undefined(o.attn_mask), or_undefined(o.alibi_slopes), or_undefined(o.sinks)};
}
template <class... Ranges>
bool any_has_tangent(const Ranges&... ranges) {
  return (std::any_of(ranges.begin(), ranges.end(), has_tangent) || ...);
}
template <class... Ranges>
bool is_differentiated(const Ranges&... ranges) {
  return at::GradMode::is_enabled() && (std::any_of(ranges.begin(), ranges.end(), requires_grad) || ...);
}

// The options, kept as attention's are; inputs first in saved, key_lengths right after them.
void save_score_options(AutogradContext& context, const ScoreOptions& o) { save_options(context, o.options()); }
ScoreOptions saved_score_options(const AutogradContext& context, const variable_list& saved) {
  const variable_list in_order = {saved[kMapQuery],    saved[kMapKey],         Tensor(),
                                  saved[kMapAttnMask], saved[kMapAlibiSlopes], saved[kMapSinks]};
  return ScoreOptions::of(saved_options(context, in_order, saved[kMapGradients]));
}

// What a Function's backward returns: the wanted gradients, each at its input's edge.
template <class Call>
variable_list gradients_of(AutogradContext& context, const variable_list& saved, bool any_incoming, Call&& call) {
  Edges edges(context);
  MapOutputMask wanted;
  for (size_t i = 0; i < kMapGradients; ++i) wanted[i] = edges.next_is_wanted(saved[i]);
  variable_list results(edges.count() + kOtherArguments);
  if (!any_incoming) return results;
  // Through the dispatcher, whose Autograd kernel knows whether this backward is itself differentiated.
  const auto computed = as_array(call(wanted));
  for (size_t i = 0, edge = 0; i < kMapGradients; ++i) {
    if (!saved[i].defined()) continue;
    if (wanted[i]) results[edge] = computed[i];
    ++edge;
  }
  return results;
}

class StatisticsFunction : public torch::autograd::Function<StatisticsFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static variable_list forward(AutogradContext* context, at::TensorList, const StatisticsArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto results = as_array(AttentionStatisticsForward::call(*a));
    context->set_materialize_grads(false);
    variable_list constant = {results[kArgmax], results[kTopIndices]};
    for (const Statistic s : {kWindowMass, kTopWeights, kColumnSum})
      if (results[s].dim() == 1) constant.push_back(results[s]);  // not asked for
    context->mark_non_differentiable(constant);
    const MapInputs inputs = map_inputs(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.push_back(or_undefined(a->options.key_lengths));
    saved.insert(saved.end(), results.begin(), results.begin() + kColumnSum);
    context->save_for_backward(std::move(saved));
    save_score_options(*context, a->options);
    if (a->mass_window.has_value()) context->saved_data["mass_window"] = *a->mass_window;
    return {results.begin(), results.end()};
  }

  static variable_list backward(AutogradContext* context, const variable_list& g) {
    const variable_list saved = context->get_saved_variables();
    const auto incoming = {g[kLogsumexp],  g[kEntropy],    g[kMaxWeight], g[kMeanDistance],
                           g[kWindowMass], g[kTopWeights], g[kColumnSum]};
    const bool any = std::any_of(incoming.begin(), incoming.end(), [](const Tensor& t) { return t.defined(); });
    return gradients_of(*context, saved, any, [&](const MapOutputMask& wanted) {
      const auto statistic = [&](Statistic s) { return or_none(saved[kMapGradients + 1 + s]); };
      const auto& data = context->saved_data;
      const auto window = data.find("mass_window");
      return AttentionStatisticsBackward::call(
          {or_none(g[kLogsumexp]),
           or_none(g[kEntropy]),
           or_none(g[kMaxWeight]),
           or_none(g[kMeanDistance]),
           or_none(g[kWindowMass]),
           or_none(g[kTopWeights]),
           or_none(g[kColumnSum]),
           saved[kMapQuery],
           saved[kMapKey],
           saved[kMapGradients + 1 + kLogsumexp],
           statistic(kEntropy),
           statistic(kMaxWeight),
           statistic(kArgmax),
           statistic(kMeanDistance),
           statistic(kWindowMass),
           statistic(kTopWeights),
           statistic(kTopIndices),
           saved_score_options(*context, saved),
           window == data.end() ? std::nullopt : std::optional<SymInt>(window->second.toSymInt()),
           wanted});
    });
  }
};

StatisticsResult attention_statistics_forward_autograd(const StatisticsArguments& a) {
  const MapInputs inputs = map_inputs(a);
  if (any_has_tangent(inputs)) return composite::attention_statistics_forward(a);
  if (is_differentiated(inputs)) {
    const auto r = apply<StatisticsFunction>(present(inputs), a);
    return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionStatisticsForward::call(a);
}

MapBackwardResult attention_statistics_backward_autograd(const StatisticsBackwardArguments& a) {
  const MapInputs inputs = map_inputs(a);
  const std::array<Tensor, 7> gradients = {or_undefined(a.grad_logsumexp),   or_undefined(a.grad_entropy),
                                           or_undefined(a.grad_max_weight),  or_undefined(a.grad_mean_distance),
                                           or_undefined(a.grad_window_mass), or_undefined(a.grad_top_weights),
                                           or_undefined(a.grad_column_sum)};
  if (any_has_tangent(inputs, gradients) || is_differentiated(inputs, gradients))
    return composite::attention_statistics_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionStatisticsBackward::call(a);
}

class WeightsFunction : public torch::autograd::Function<WeightsFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const WeightsArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto [weights, logsumexp] = AttentionWeightsForward::call(*a);
    context->set_materialize_grads(false);
    context->mark_non_differentiable({logsumexp});
    const MapInputs inputs = map_inputs(*a);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(), {or_undefined(a->options.key_lengths), logsumexp, or_undefined(a->selected.rows)});
    context->save_for_backward(std::move(saved));
    save_score_options(*context, a->options);
    if (a->selected.query_length.has_value()) context->saved_data["query_length"] = *a->selected.query_length;
    context->saved_data["mean"] = a->mean;
    return {weights, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return gradients_of(*context, saved, gradients[0].defined(), [&](const MapOutputMask& wanted) {
      const auto& data = context->saved_data;
      const auto length = data.find("query_length");
      return AttentionWeightsBackward::call(
          {gradients[0],
           saved[kMapQuery],
           saved[kMapKey],
           saved[kMapGradients + 1],
           saved_score_options(*context, saved),
           {or_none(saved[kMapGradients + 2]),
            length == data.end() ? std::nullopt : std::optional<SymInt>(length->second.toSymInt())},
           data.at("mean").toBool(),
           wanted});
    });
  }
};

WeightsResult attention_weights_forward_autograd(const WeightsArguments& a) {
  const MapInputs inputs = map_inputs(a);
  if (any_has_tangent(inputs)) return composite::attention_weights_forward(a);
  if (is_differentiated(inputs)) {
    const auto r = apply<WeightsFunction>(present(inputs), a);
    return {r[0], r[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionWeightsForward::call(a);
}

MapBackwardResult attention_weights_backward_autograd(const WeightsBackwardArguments& a) {
  const MapInputs inputs = map_inputs(a);
  const std::array<Tensor, 1> gradients = {a.grad_weights};
  if (any_has_tangent(inputs, gradients) || is_differentiated(inputs, gradients))
    return composite::attention_weights_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionWeightsBackward::call(a);
}

// Attention with its weights: what flows back through the weights adds to what attention_backward makes of the rest.
class WithWeightsFunction : public torch::autograd::Function<WithWeightsFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList, const WithWeightsArguments* a,
                               TransformState* transforms) {
    const BelowAutograd guard(*transforms);
    const auto [out, weights, logsumexp] = AttentionWithWeightsForward::call(*a);
    context->set_materialize_grads(false);
    const Inputs inputs = inputs_of(a->forward());
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(), {or_undefined(a->options.key_lengths), out, logsumexp});
    context->save_for_backward(std::move(saved));
    save_score_options(*context, a->options);
    context->saved_data["mean"] = a->mean;
    return {out, weights, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &grad_out = gradients[0], &grad_weights = gradients[1], &grad_logsumexp = gradients[2];
    const Tensor &query = saved[kQuery], &key = saved[kKey], &out = saved[7], &logsumexp = saved[8];
    const Options options{saved_options(*context, saved, saved[6])};
    Edges edges(*context);
    OutputMask wanted;
    for (size_t i = 0; i < kGradients; ++i) wanted[i] = edges.next_is_wanted(saved[i]);
    std::array<Tensor, kGradients> sums;
    if (grad_out.defined() || grad_logsumexp.defined()) {
      const Tensor rng_state = at::zeros({kRngStateSize}, query.options().dtype(at::kLong));
      const auto computed = as_array(
          AttentionBackward::call({grad_out.defined() ? grad_out : at::zeros_like(out), or_none(grad_logsumexp), query,
                                   key, saved[kValue], out, logsumexp, rng_state, options, wanted}));
      for (size_t i = 0; i < kGradients; ++i)
        if (wanted[i]) sums[i] = computed[i];
    }
    if (grad_weights.defined()) {
      const MapOutputMask map_wanted = {wanted[kQuery], wanted[kKey], wanted[kAttnMask], wanted[kAlibiSlopes],
                                        wanted[kSinks]};
      const auto computed = as_array(AttentionWeightsBackward::call({grad_weights,
                                                                     query,
                                                                     key,
                                                                     logsumexp,
                                                                     ScoreOptions::of(options),
                                                                     {},
                                                                     context->saved_data.at("mean").toBool(),
                                                                     map_wanted}));
      constexpr std::array<Gradient, kMapGradients> places = {kQuery, kKey, kAttnMask, kAlibiSlopes, kSinks};
      for (size_t i = 0; i < kMapGradients; ++i) {
        if (!map_wanted[i]) continue;
        Tensor& sum = sums[places[i]];
        sum = sum.defined() ? sum + computed[i] : computed[i];
      }
    }
    variable_list results(edges.count() + kOtherArguments);
    for (size_t i = 0, edge = 0; i < kGradients; ++i)
      if (saved[i].defined()) results[edge++] = sums[i];
    return results;
  }
};

WithWeightsResult attention_with_weights_forward_autograd(const WithWeightsArguments& a) {
  const Inputs inputs = inputs_of(a.forward());
  if (any_has_tangent(inputs)) return composite::attention_with_weights_forward(a);
  if (is_differentiated(inputs)) {
    const auto r = apply<WithWeightsFunction>(present(inputs), a);
    return {r[0], r[1], r[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionWithWeightsForward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<attention_statistics_forward_autograd>);
  m.impl("attention_statistics_backward", AttentionStatisticsBackward::kernel<attention_statistics_backward_autograd>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<attention_weights_forward_autograd>);
  m.impl("attention_with_weights_forward",
         AttentionWithWeightsForward::kernel<attention_with_weights_forward_autograd>);
  m.impl("attention_weights_backward", AttentionWeightsBackward::kernel<attention_weights_backward_autograd>);
}

}  // namespace torch_attn::ops
