// attention_statistics and attention_weights in ATen operators, and their gradients by formula; see map_formula.h.
//
// With P = softmax(score) over keys and sink, and w the gradient with respect to P (0 for the sink), the gradient of a
// score is P · (w − Σ P·w + grad_logsumexp). Each statistic adds its term to w:
//   entropy −Σ P·log P: −log P − 1;  Σ P·distance: distance;  mass in a window: 1 inside;  a chosen weight: 1 there;
//   column sums: the column's gradient.
#include "ops/composite/map_formula.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "ops/composite/weights.h"

namespace torch_attn::ops::composite {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// log P, 0 where P is.
Tensor log_weights(const Weights& w) { return w.weights.masked_fill(w.weights == 0, 1).log(); }
Tensor distance(const Weights& w) { return w.minus_distance.neg().to(w.weights.scalar_type()); }

Tensor is_within(const Weights& w, const SymInt& window) {
  return (w.minus_distance + window >= 0).to(w.weights.scalar_type());
}

// The keys of the k highest scores, the lowest index first among equal ones; -1 where there are fewer.
Tensor highest_keys(const Weights& w, int64_t k) {
  const auto [sorted, order] = at::sort(w.scores.detach(), /*stable=*/true, -1, /*descending=*/true);
  const Tensor attended = order.masked_fill(sorted == -kInfinity, -1);
  return at::constant_pad_nd(attended, {0, k}, -1).narrow(-1, 0, k);
}
Tensor weights_at(const Weights& w, const Tensor& keys) {
  const Tensor padded = at::constant_pad_nd(w.weights, {0, 1});  // so that there is a key to read in any case
  return at::gather(padded, -1, keys.clamp_min(0)).masked_fill(keys < 0, 0);
}

// w plus gradient at the keys of each row.
Tensor add_at(const Tensor& w, const Tensor& keys, const Tensor& gradient) {
  const Tensor padded = at::constant_pad_nd(w, {0, 1});
  return at::scatter_add(padded, -1, keys.clamp_min(0), gradient.masked_fill(keys < 0, 0))
      .narrow_symint(-1, 0, w.sym_size(-1));
}

MapBackwardResult backward_of(const Weights& weights, const Tensor& w, const OptionalTensor& grad_logsumexp,
                              const Options& options, const MapOutputMask& output_mask) {
  Tensor row_term = (weights.weights * w).sum(-1, /*keepdim=*/true);
  if (is_defined(grad_logsumexp)) row_term = row_term - grad_logsumexp->unsqueeze(-1).masked_fill(weights.is_empty, 0);
  const Tensor grad_scores = weights.weights * (w - row_term);
  return without_value(
      gradients_of_scores(weights, grad_scores, weights.sink_gradient(row_term), options, with_value(output_mask)));
}

}  // namespace

StatisticsResult attention_statistics_forward(const StatisticsArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Weights w = compute_weights(a.forward(), Tensor());
  const Tensor highest = highest_keys(w, std::max<int64_t>(a.top_k, 1));
  const Tensor top = a.top_k > 0 ? highest.clone() : at::empty({0}, highest.options());
  const Tensor argmax = highest.select(-1, 0).contiguous();
  const auto none = [&] { return at::empty({0}, w.weights.options()); };
  return {w.logsumexp.squeeze(-1),
          (w.weights * log_weights(w)).sum(-1).neg(),
          weights_at(w, argmax.unsqueeze(-1)).squeeze(-1),
          argmax,
          (w.weights * distance(w)).sum(-1),
          a.mass_window.has_value() ? (w.weights * is_within(w, *a.mass_window)).sum(-1) : none(),
          a.top_k > 0 ? weights_at(w, top) : none(),
          top,
          a.column_sum ? w.weights.sum(-2) : none()};
}

MapBackwardResult attention_statistics_backward(const StatisticsBackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Weights weights = compute_weights(a.forward(), Tensor());
  const auto per_row = [&](const OptionalTensor& gradient) { return gradient->unsqueeze(-1); };
  Tensor w = at::zeros_like(weights.weights);
  if (is_defined(a.grad_entropy)) w = w - per_row(a.grad_entropy) * (log_weights(weights) + 1);
  if (is_defined(a.grad_mean_distance)) w = w + per_row(a.grad_mean_distance) * distance(weights);
  if (is_defined(a.grad_window_mass)) w = w + per_row(a.grad_window_mass) * is_within(weights, *a.mass_window);
  if (is_defined(a.grad_column_sum)) w = w + a.grad_column_sum->unsqueeze(-2);
  if (is_defined(a.grad_max_weight)) w = add_at(w, a.argmax->unsqueeze(-1), per_row(a.grad_max_weight));
  if (is_defined(a.grad_top_weights)) w = add_at(w, *a.top_indices, *a.grad_top_weights);
  return backward_of(weights, w, a.grad_logsumexp, {a.options.options()}, a.output_mask);
}

WeightsResult attention_weights_forward(const WeightsArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Weights w = compute_weights(a.forward(), Tensor(), a.selected);
  const Tensor weights = a.mean ? w.weights.mean(1) : w.weights;
  return {weights.to(a.query.scalar_type()).contiguous(), w.logsumexp.squeeze(-1)};
}

WithWeightsResult attention_with_weights_forward(const WithWeightsArguments& a) {
  const auto [out, logsumexp, rng_state] = AttentionForward::call(a.forward());
  return {out, std::get<0>(AttentionWeightsForward::call(a.weights(logsumexp))), logsumexp};
}

MapBackwardResult attention_weights_backward(const WeightsBackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Weights weights = compute_weights(a.forward().forward(), Tensor(), a.selected);
  Tensor w = a.grad_weights.to(weights.weights.scalar_type());
  if (a.mean) w = (w / c10::Scalar(weights.sizes.heads)).unsqueeze(1).expand_symint(weights.weights.sym_sizes());
  return backward_of(weights, w, std::nullopt, {a.options.options()}, a.output_mask);
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<attention_statistics_forward>);
  m.impl("attention_statistics_backward", AttentionStatisticsBackward::kernel<attention_statistics_backward>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<attention_weights_forward>);
  m.impl("attention_with_weights_forward", AttentionWithWeightsForward::kernel<attention_with_weights_forward>);
  m.impl("attention_weights_backward", AttentionWeightsBackward::kernel<attention_weights_backward>);
}

}  // namespace torch_attn::ops::composite
