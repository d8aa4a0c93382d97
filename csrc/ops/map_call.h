// What every fused implementation of the operators on attention maps does around its kernels, as kernel_call.h is for
// attention itself. Included by cpu/maps.cpp and cuda/maps.cpp.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/map_problem.h"
#include "ops/kernel_call.h"
#include "ops/map_outputs.h"

namespace torch_attn::ops {

inline void* data_or_null(const Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr(); }
inline const void* data_or_null(const OptionalTensor& t) { return is_defined(t) ? t->const_data_ptr() : nullptr; }
inline OptionalTensor contiguous(const OptionalTensor& t) {
  return is_defined(t) ? OptionalTensor(t->contiguous()) : t;
}

// Tells the kernels which rows of a longer query theirs are. rows holds the numbers they will read; on a GPU these are
// not checked here: what chose the rows has.
inline void set_selected_rows(AttentionProblem& p, const SelectedRows& selected, Tensor& rows) {
  if (!is_defined(selected.rows)) return;
  rows = selected.rows->contiguous();
  p.full_query_length = selected.query_length->expect_int();
  p.query_rows = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; rows.is_cpu() && i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(p.query_rows[i] >= 0 && p.query_rows[i] < p.full_query_length,
                      "attention_weights: query_rows must be from 0 to query_length - 1 = ", p.full_query_length - 1,
                      ", but query_rows[", i, "] is ", p.query_rows[i], ".");
}

// run(problem, outputs)
template <class Run>
StatisticsResult run_statistics(const StatisticsArguments& a, Run&& run) {
  check_arguments(a);
  const PreparedProblem prepared = make_problem(a.forward(), Tensor());
  const StatisticsResult results = empty_statistics(a);
  StatisticsOutputs o;
  o.logsumexp = data_or_null(std::get<kLogsumexp>(results));
  o.entropy = data_or_null(std::get<kEntropy>(results));
  o.max_weight = data_or_null(std::get<kMaxWeight>(results));
  o.argmax = static_cast<int64_t*>(data_or_null(std::get<kArgmax>(results)));
  o.mean_distance = data_or_null(std::get<kMeanDistance>(results));
  o.window_mass = data_or_null(std::get<kWindowMass>(results));
  o.top_weights = data_or_null(std::get<kTopWeights>(results));
  o.top_indices = static_cast<int64_t*>(data_or_null(std::get<kTopIndices>(results)));
  o.column_sum = data_or_null(std::get<kColumnSum>(results));
  o.mass_window = a.mass_window.has_value() ? a.mass_window->expect_int() : 0;
  o.top_k = a.top_k;
  run(prepared.problem, o);
  return results;
}

// find_logsumexp(problem, to) and run(problem, outputs)
template <class FindLogsumexp, class Run>
WeightsResult run_weights(const WeightsArguments& a, FindLogsumexp&& find_logsumexp, Run&& run) {
  check_arguments(a);
  const PreparedProblem prepared = make_problem(a.forward(), Tensor());
  AttentionProblem p = prepared.problem;
  Tensor rows;
  set_selected_rows(p, a.selected, rows);
  const auto [weights, logsumexp] = empty_weights(a);
  if (logsumexp.numel() == 0) return {weights.zero_(), logsumexp};
  if (is_defined(a.logsumexp)) {
    logsumexp.copy_(*a.logsumexp);
  } else {
    find_logsumexp(p, logsumexp.mutable_data_ptr());
  }
  WeightsOutputs o;
  o.logsumexp = logsumexp.const_data_ptr();
  o.weights = view_of_matrix(a.mean ? weights.unsqueeze(1) : weights);
  o.mean = a.mean;
  if (weights.numel() > 0) run(p, o);
  return {weights, logsumexp};
}

// Attention's backward with the terms that set_terms adds to it. row_terms: see MapBackwardTensors.
// run(problem, tensors).
template <class SetTerms, class Run>
MapBackwardResult run_map_backward(const ForwardArguments& f, const Tensor& logsumexp, const Tensor& row_terms,
                                   const SelectedRows& selected, const MapOutputMask& output_mask, SetTerms&& set_terms,
                                   Run&& run) {
  const Tensor nothing = without_columns(f.query);
  const Tensor rng_state = at::zeros({kRngStateSize}, f.query.options().dtype(at::kLong));
  const BackwardArguments backward{nothing, row_terms, f.query,   f.key,     f.value,
                                   nothing, logsumexp, rng_state, f.options, with_value(output_mask)};
  return without_value(run_backward(backward, [&](const AttentionProblem& problem, const BackwardTensors& tensors) {
    AttentionProblem p = problem;
    Tensor rows;
    set_selected_rows(p, selected, rows);
    MapBackwardTensors t;
    static_cast<BackwardTensors&>(t) = tensors;
    t.out = t.grad_out = TensorView();
    t.row_terms = row_terms.mutable_data_ptr();
    set_terms(t);
    run(p, t);
  }));
}

// grad_logsumexp − Σ P · (d loss / d P), as far as the statistics tell.
inline Tensor known_row_terms(const StatisticsBackwardArguments& a) {
  Tensor terms = is_defined(a.grad_logsumexp) ? a.grad_logsumexp->clone() : at::zeros_like(a.logsumexp);
  const auto subtract = [&](const OptionalTensor& gradient, const OptionalTensor& statistic) {
    if (is_defined(gradient)) terms = terms - *gradient * *statistic;
  };
  subtract(a.grad_max_weight, a.max_weight);
  subtract(a.grad_mean_distance, a.mean_distance);
  subtract(a.grad_window_mass, a.window_mass);
  if (is_defined(a.grad_top_weights)) terms = terms - (*a.grad_top_weights * *a.top_weights).sum(-1);
  if (is_defined(a.grad_entropy)) {
    // Σ P · (−log P − 1) = entropy − Σ P, where Σ P is what a sink leaves to the keys.
    Tensor mass = (a.logsumexp != -std::numeric_limits<double>::infinity()).to(a.logsumexp.scalar_type());
    if (is_defined(a.options.sinks)) mass = mass - sink_weights({a.options.options()}, a.logsumexp);
    terms = terms - *a.grad_entropy * (*a.entropy - mass);
  }
  return terms.contiguous();
}

// run(problem, tensors)
template <class Run>
MapBackwardResult run_statistics_backward(const StatisticsBackwardArguments& a, Run&& run) {
  check_arguments(a);
  const OptionalTensor entropy = contiguous(a.grad_entropy), mean_distance = contiguous(a.grad_mean_distance),
                       window_mass = contiguous(a.grad_window_mass), column_sum = contiguous(a.grad_column_sum);
  // The largest weight and the top ones, as one list of chosen keys.
  std::vector<Tensor> keys, weights;
  if (is_defined(a.grad_max_weight)) {
    keys.push_back(a.argmax->unsqueeze(-1));
    weights.push_back(a.grad_max_weight->unsqueeze(-1));
  }
  if (is_defined(a.grad_top_weights)) {
    keys.push_back(*a.top_indices);
    weights.push_back(*a.grad_top_weights);
  }
  const Tensor chosen_keys = keys.empty() ? Tensor() : at::cat(keys, -1).contiguous();
  const Tensor chosen_weights = keys.empty() ? Tensor() : at::cat(weights, -1).contiguous();
  return run_map_backward(
      a.forward(), a.logsumexp, known_row_terms(a), {}, a.output_mask,
      [&](MapBackwardTensors& t) {
        t.entropy = data_or_null(entropy);
        t.mean_distance = data_or_null(mean_distance);
        t.window_mass = data_or_null(window_mass);
        t.mass_window = a.mass_window.has_value() ? a.mass_window->expect_int() : 0;
        t.column_sum = data_or_null(column_sum);
        if (!chosen_keys.defined()) return;
        t.chosen = chosen_keys.size(-1);
        t.chosen_keys = chosen_keys.const_data_ptr<int64_t>();
        t.chosen_weights = chosen_weights.const_data_ptr();
      },
      run);
}

// run(problem, tensors)
template <class Run>
MapBackwardResult run_weights_backward(const WeightsBackwardArguments& a, Run&& run) {
  check_arguments(a);
  const Tensor weights = with_unit_column_stride(a.mean ? a.grad_weights.unsqueeze(1) : a.grad_weights);
  return run_map_backward(
      a.forward().forward(), a.logsumexp, at::zeros(a.logsumexp.sizes(), a.logsumexp.options()), a.selected,
      a.output_mask,
      [&](MapBackwardTensors& t) {
        t.weights = view_of_matrix(weights);
        t.weights_factor = a.mean ? 1.0 / static_cast<double>(a.query.size(1)) : 1.0;
      },
      run);
}

}  // namespace torch_attn::ops
