// What every fused implementation of hard attention's operators does around its kernels, as kernel_call.h for soft
// attention. Kernels is constructed with a tensor of the call, on whose device it runs, and offers
//
//   select(problem, selection, outputs)   backward(problem, tensors)
//   gather(choice, source, out)           scatter(choice, rows, out)           dots(choice, rows, source, dots)
//
// as cpu/selection_kernels.h describes them. Included by the implementations' files.
#pragma once

#include <ATen/ops/zeros_like.h>

#include "core/selection.h"
#include "ops/kernel_call.h"
#include "ops/selection.h"

namespace torch_attn::ops {

inline SelectionRule rule_of(const SelectArguments& a) {
  if (!a.sample) return SelectionRule::kHighest;
  return a.replacement ? SelectionRule::kWithReplacement : SelectionRule::kWithoutReplacement;
}

template <class Kernels>
SelectResult select_keys_with(const SelectArguments& a) {
  check_arguments(a);
  const Tensor rng_state = rng_state_of(a);
  PreparedProblem prepared = make_problem(a.forward(), rng_state);
  AttentionProblem& p = prepared.problem;
  if (a.sample) set_rng_state(p, rng_state);
  const auto integers = a.query.options().dtype(at::kLong);
  const auto reals = a.query.options().dtype(accumulator_type(a.query.scalar_type()));
  const auto per_choice = [&](const at::TensorOptions& options) {
    return at::empty({p.batch, p.heads, p.query_length, a.count}, options);
  };
  const auto per_row = [&] { return at::empty({p.batch, p.heads, p.query_length}, reals); };
  const Tensor indices = per_choice(integers), scores = per_choice(reals), log_prob = per_choice(reals);
  const Tensor entropy = per_row(), logsumexp = per_row();
  if (indices.numel() > 0) {
    const SelectionOutputs outputs{indices.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr(),
                                   log_prob.mutable_data_ptr(), entropy.mutable_data_ptr(),
                                   logsumexp.mutable_data_ptr()};
    Kernels(a.query).select(p, {rule_of(a), a.count}, outputs);
  }
  return {indices, scores, log_prob, entropy, logsumexp, rng_state};
}

// What each row's logsumexp, its weights' logarithms and its chosen scores receive, of accumulator type.
struct RowGradients {
  Tensor logsumexp, log_weight, chosen;

  explicit RowGradients(const SelectBackwardArguments& a) {
    const Tensor valid = a.indices >= 0;
    logsumexp = is_defined(a.grad_logsumexp) ? *a.grad_logsumexp : at::zeros_like(a.logsumexp);
    if (is_defined(a.grad_log_prob)) {
      chosen = a.grad_log_prob->masked_fill(valid.logical_not(), 0);
      logsumexp = logsumexp - chosen.sum(-1);
    }
    if (is_defined(a.grad_scores)) {
      const Tensor scores = a.grad_scores->masked_fill(valid.logical_not(), 0);
      chosen = chosen.defined() ? chosen + scores : scores;
    }
    if (is_defined(a.grad_entropy)) {  // −Σ P log P passes −P · (log P + entropy) to a score
      log_weight = a.grad_entropy->neg();
      logsumexp = logsumexp + log_weight * a.entropy;
    }
  }

  // The sink is a candidate like any key.
  Tensor of_sinks(const SelectBackwardArguments& a) const {
    const Tensor& sinks = *a.options.sinks;
    const Tensor log_share = sinks.to(a.logsumexp.scalar_type()).unsqueeze(-1) - a.logsumexp;
    const Tensor share = sink_weights({a.options.options()}, a.logsumexp);
    Tensor sum = share * logsumexp;
    if (log_weight.defined()) sum = sum + share * log_weight * log_share.masked_fill(share == 0, 0);
    if (chosen.defined()) sum = sum + chosen.masked_fill(a.indices != a.key.size(2), 0).sum(-1);
    return per_head_gradient(sum.sum(2), sinks);
  }
};

template <class Kernels>
SelectBackwardResult dense_backward(const SelectBackwardArguments& a, const RowGradients& rows) {
  const ForwardArguments forward = a.forward();
  const auto contiguous = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  const Tensor indices = a.indices.contiguous(), log_weight = contiguous(rows.log_weight);
  const Tensor chosen = contiguous(rows.chosen);

  const Tensor no_columns = at::empty({a.query.size(0), a.query.size(1), a.query.size(2), 0}, a.query.options());
  BackwardArguments b{no_columns,     rows.logsumexp, forward.query, forward.key,
                      forward.value,  no_columns,     a.logsumexp,   make_rng_state(false, a.query),
                      forward.options};
  for (size_t i = 0; i < kSelectGradients.size(); ++i) b.output_mask[kSelectGradients[i]] = a.output_mask[i];
  b.output_mask[kSinks] = false;
  auto r = run_backward(b, [&](const AttentionProblem& p, const BackwardTensors& tensors) {
    SelectionBackwardTensors t;
    static_cast<BackwardTensors&>(t) = tensors;
    if (log_weight.defined()) t.log_weight_gradient = log_weight.const_data_ptr();
    t.indices = indices.const_data_ptr<int64_t>();
    if (chosen.defined()) t.chosen_gradient = chosen.const_data_ptr();
    t.count = indices.size(3);
    Kernels(a.query).backward(p, t);
  });
  const bool sinks = a.output_mask[kSelectGradients.size() - 1];
  return {std::get<kQuery>(r), std::get<kKey>(r), std::get<kAttnMask>(r), std::get<kAlibiSlopes>(r),
          sinks ? rows.of_sinks(a) : no_gradient(a.query)};
}

// source (B, Hkv, S, D) by indices (B, Hq, R, count).
struct PreparedChoice {
  Tensor indices, weights;
  RowChoice choice;

  PreparedChoice(const Tensor& source, const Tensor& by, const Tensor& weighted)
      : indices(by.contiguous()), weights(weighted.defined() ? weighted.contiguous() : weighted) {
    choice.batch = by.size(0);
    choice.heads = by.size(1);
    choice.kv_heads = source.size(1);
    choice.length = by.size(2);
    choice.count = by.size(3);
    choice.source_length = source.size(2);
    choice.columns = source.size(3);
    choice.indices = indices.const_data_ptr<int64_t>();
    if (weights.defined()) choice.weights = weights.const_data_ptr();
  }
};

template <class Kernels>
Tensor gathered(const Tensor& source, const PreparedChoice& prepared) {
  const RowChoice& c = prepared.choice;
  const Tensor rows = with_unit_column_stride(source);
  Tensor out = empty_by_row(c.batch, c.heads, c.length, c.columns, source.options());
  Kernels(source).gather(c, view_of_matrix(rows), view_of_matrix(out));
  return out;
}

template <class Kernels>
Tensor scattered(const Tensor& rows, const Tensor& like, const PreparedChoice& prepared) {
  const Tensor added = with_unit_column_stride(rows);
  Tensor out = empty_by_row_like(like);
  Kernels(like).scatter(prepared.choice, view_of_matrix(added), view_of_matrix(out));
  return out;
}

template <class Kernels>
Tensor dots_of_chosen(const Tensor& rows, const Tensor& source, const PreparedChoice& prepared) {
  const Tensor left = with_unit_column_stride(rows), right = with_unit_column_stride(source);
  Tensor dots = at::empty(prepared.indices.sizes(), rows.options().dtype(accumulator_type(rows.scalar_type())));
  Kernels(source).dots(prepared.choice, view_of_matrix(left), view_of_matrix(right), dots.mutable_data_ptr());
  return dots;
}

template <class Kernels>
Tensor gather_values_with(const GatherArguments& a) {
  check_arguments(a);
  return gathered<Kernels>(a.value, PreparedChoice(a.value, a.indices, a.weights.value_or(Tensor())));
}

template <class Kernels>
GatherBackwardResult gather_values_backward_with(const GatherBackwardArguments& a) {
  check_arguments(a);
  const PreparedChoice prepared(a.value, a.indices, a.weights.value_or(Tensor()));
  return {a.output_mask[0] ? scattered<Kernels>(a.grad_out, a.value, prepared) : no_gradient(a.value),
          a.output_mask[1] ? dots_of_chosen<Kernels>(a.grad_out, a.value, prepared) : no_gradient(a.value)};
}

// Where nothing but the chosen scores has a gradient, only the chosen keys take part.
inline bool is_sparse(const SelectBackwardArguments& a) {
  return !is_defined(a.grad_log_prob) && !is_defined(a.grad_entropy) && !is_defined(a.grad_logsumexp) &&
         is_defined(a.grad_scores) && !a.output_mask[2] && !a.output_mask[3];
}

template <class Kernels>
SelectBackwardResult sparse_backward(const SelectBackwardArguments& a, const RowGradients& rows) {
  const AttentionProblem p = make_problem(a.forward(), Tensor()).problem;
  Tensor factor = rows.chosen * p.scale;
  if (p.softcap != 0) {
    const Tensor dots = dots_of_chosen<Kernels>(a.query, a.key, PreparedChoice(a.key, a.indices, Tensor()));
    factor = factor * (1 - (dots * (p.scale / p.softcap)).tanh().square());
  }
  const PreparedChoice prepared(a.key, a.indices, factor);
  return {a.output_mask[0] ? gathered<Kernels>(a.key, prepared) : no_gradient(a.query),
          a.output_mask[1] ? scattered<Kernels>(a.query, a.key, prepared) : no_gradient(a.query), no_gradient(a.query),
          no_gradient(a.query), a.output_mask[4] ? rows.of_sinks(a) : no_gradient(a.query)};
}

template <class Kernels>
SelectBackwardResult select_keys_backward_with(const SelectBackwardArguments& a) {
  check_arguments(a);
  const RowGradients rows(a);
  return is_sparse(a) ? sparse_backward<Kernels>(a, rows) : dense_backward<Kernels>(a, rows);
}

}  // namespace torch_attn::ops
