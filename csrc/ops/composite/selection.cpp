#include "ops/composite/selection.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "core/selection.h"
#include "ops/check.h"
#include "ops/composite/weights.h"
#include "ops/outputs.h"

namespace torch_attn::ops::composite {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Weights weights_of(const ForwardArguments& a) {
  check_arguments(a);
  return compute_weights(a, Tensor());
}

// log softmax of the candidates, the sink among them, (B, Hq, L, candidates): −∞ for what is masked, 0 in empty rows.
Tensor log_weights(const Weights& w) { return at::log_softmax(w.logits, -1).masked_fill(w.is_empty, 0); }

// −Σ P log P, where P log P is 0 for P = 0.
Tensor entropy_of(const Tensor& log_weights) {
  const Tensor finite = log_weights.masked_fill(log_weights == -kInfinity, 0);
  return (log_weights.exp() * finite).sum(-1).neg();
}

// Which of a selection's places hold a candidate, and the index as gather takes it.
struct Chosen {
  Tensor valid, place;

  explicit Chosen(const Tensor& indices) : valid(indices >= 0), place(indices.clamp_min(0)) {}
  Tensor gather(const Tensor& matrix, double otherwise) const {
    if (matrix.sym_size(-1).sym_eq(0).expect_true(__FILE__, __LINE__))
      return at::full_like(place, otherwise, matrix.options());
    return at::where(valid, matrix.gather(-1, place), at::scalar_tensor(otherwise, matrix.options()));
  }
};

// The first count columns of indices, by falling values; −1 where a value is −∞ or there are no more columns.
Tensor highest(const Tensor& values, int64_t count) {
  auto [sorted, indices] = values.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  indices = indices.masked_fill(sorted == -kInfinity, -1);
  const SymInt columns = values.sym_size(-1);
  return at::constant_pad_nd_symint(indices, {0, (columns.max(count)) - columns}, -1).narrow(-1, 0, count);
}

// The race of core/selection.h: weights (B, Hq, L, S) of the keys, relative to each row's largest.
Tensor race(const Tensor& weights, const Tensor& sink, const Tensor& noise, const SymInt& keys) {
  constexpr int64_t group = SelectionNoise::kGroupKeys;
  const SymInt groups = ((keys + (group - 1)) / group).max(SymInt(1));
  const Tensor grouped =
      at::constant_pad_nd_symint(weights, {0, groups * group - keys}).unflatten_symint(-1, {groups, group});
  Tensor sums = grouped.sum(-1);
  if (sink.defined()) sums = at::cat({sums, sink}, -1);
  const Tensor times = noise.select(-1, 0) / sums.unsqueeze(-2);  // (B, Hq, L, count, groups)
  const auto [time, first] = times.min(-1);
  const Tensor inside = first.clamp_max(groups - 1);
  const Tensor uniform = noise.select(-1, 1).gather(-1, first.unsqueeze(-1));
  const Tensor members = grouped.gather(-2, inside.unsqueeze(-1).expand_symint({-1, -1, -1, -1, group}));
  const Tensor passed = members.cumsum(-1) <= uniform * members.sum(-1, /*keepdim=*/true);
  const Tensor member = passed.sum(-1).clamp_max(group - 1);
  const Tensor index = at::where(first == groups, keys, inside * group + member);
  return index.masked_fill(time == kInfinity, -1);
}

Tensor draw(const Weights& w, const SelectArguments& a, const Tensor& rng_state) {
  const bool sink = has_sink(a.options);
  const Sizes& s = w.sizes;
  const Tensor logits = w.logits.masked_fill(w.is_empty, -kInfinity);
  if (!a.sample) return highest(logits, a.count);
  const Tensor noise =
      NoiseOfSelection::call({rng_state, s.batch, s.heads, s.query_length, s.key_length, a.count, a.replacement, sink})
          .to(logits.options());
  const Tensor relative = logits - logits.amax(-1, /*keepdim=*/true).masked_fill(w.is_empty, 0);
  if (!a.replacement) return highest(relative - noise.log(), a.count);
  const Tensor weights = relative.exp();
  const Tensor of_sink = sink ? weights.narrow_symint(-1, s.key_length, 1) : Tensor();
  return race(weights.narrow_symint(-1, 0, s.key_length), of_sink, noise, s.key_length);
}

Evaluation evaluate(const Weights& w, const Tensor& indices) {
  const Tensor log_prob = log_weights(w);
  const Chosen chosen(indices);
  return {chosen.gather(w.logits, -kInfinity), chosen.gather(log_prob, 0), entropy_of(log_prob),
          w.logsumexp.squeeze(-1)};
}

}  // namespace

Evaluation evaluate_selection(const SelectArguments& a, const Tensor& indices) {
  const NoAutocast no_autocast;
  return evaluate(weights_of(a.forward()), indices);
}

SelectResult select_keys(const SelectArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Tensor rng_state = rng_state_of(a);
  const Weights w = weights_of(a.forward());
  const Sizes& s = w.sizes;
  const bool nothing = !has_sink(a.options) && s.key_length.sym_eq(0).expect_true(__FILE__, __LINE__);
  const Tensor indices =
      nothing ? at::full_symint({s.batch, s.heads, s.query_length, a.count}, -1, a.query.options().dtype(at::kLong))
              : draw(w, a, rng_state);
  const Evaluation e = evaluate(w, indices);
  return {indices, e.scores, e.log_prob, e.entropy, e.logsumexp, rng_state};
}

// The noise of core/selection.h, computed on the CPU.
Tensor selection_noise(const NoiseArguments& a) {
  NoiseArguments on_cpu = a;
  on_cpu.rng_state = a.rng_state.cpu();
  return NoiseOfSelection::call(on_cpu).to(a.rng_state.device());
}

SelectBackwardResult select_keys_backward(const SelectBackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const ForwardArguments forward = a.forward();
  const Weights w = weights_of(forward);

  // Of the candidates' scores: P · (d logsumexp − Σ_chosen d log_prob) − d entropy · P · (log P + entropy), and what
  // the chosen ones receive themselves.
  const Chosen chosen(a.indices);
  const Tensor log_prob = log_weights(w);
  const Tensor weights = log_prob.exp().masked_fill(w.is_empty, 0);
  Tensor grad = at::zeros_like(weights);
  if (is_defined(a.grad_logsumexp)) grad = grad + weights * a.grad_logsumexp->unsqueeze(-1).masked_fill(w.is_empty, 0);
  if (is_defined(a.grad_entropy)) {
    const Tensor finite = log_prob.masked_fill(log_prob == -kInfinity, 0);
    grad = grad - weights * (finite + entropy_of(log_prob).unsqueeze(-1)) * a.grad_entropy->unsqueeze(-1);
  }
  const auto add_chosen = [&](const OptionalTensor& gradient, bool of_log_prob) {
    if (!is_defined(gradient) || weights.sym_size(-1).sym_eq(0).expect_true(__FILE__, __LINE__)) return;
    const Tensor valid = gradient->masked_fill(chosen.valid.logical_not(), 0);
    grad = grad.scatter_add(-1, chosen.place, valid);
    if (of_log_prob) grad = grad - weights * valid.sum(-1, /*keepdim=*/true);
  };
  add_chosen(a.grad_scores, false);
  add_chosen(a.grad_log_prob, true);

  OutputMask wanted{};
  for (size_t i = 0; i < kSelectGradients.size(); ++i) wanted[kSelectGradients[i]] = a.output_mask[i];
  const Tensor of_keys = grad.narrow_symint(-1, 0, w.sizes.key_length);
  const Tensor of_sink = has_sink(a.options) ? grad.narrow_symint(-1, w.sizes.key_length, 1) : Tensor();
  const BackwardResult r = gradients_of_scores(w, of_keys, of_sink, forward.options, wanted);
  return {std::get<kQuery>(r), std::get<kKey>(r), std::get<kAttnMask>(r), std::get<kAlibiSlopes>(r),
          std::get<kSinks>(r)};
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("select_keys", SelectKeys::kernel<select_keys>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward>);
  m.impl("selection_noise", NoiseOfSelection::kernel<selection_noise>);
}

}  // namespace torch_attn::ops::composite
