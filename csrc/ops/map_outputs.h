// Allocation of what the operators on attention maps return, shared by the kernels and their meta versions.
#pragma once

#include <ATen/ops/empty.h>

#include "ops/map_operators.h"
#include "ops/outputs.h"

namespace torch_attn::ops {

// What attention_statistics_forward writes; a statistic that was not asked for has shape (0).
inline StatisticsResult empty_statistics(const StatisticsArguments& a) {
  const SymInt batch = a.query.sym_size(0), heads = a.query.sym_size(1), length = a.query.sym_size(2);
  const auto options = a.query.options().dtype(accumulator_type(a.query.scalar_type()));
  const auto integers = options.dtype(at::kLong);
  const auto per_row = [&](bool wanted, const at::TensorOptions& o) {
    return wanted ? at::empty_symint({batch, heads, length}, o) : at::empty({0}, o);
  };
  const auto top = [&](const at::TensorOptions& o) {
    return a.top_k > 0 ? at::empty_symint({batch, heads, length, a.top_k}, o) : at::empty({0}, o);
  };
  return {per_row(true, options),
          per_row(true, options),
          per_row(true, options),
          per_row(true, integers),
          per_row(true, options),
          per_row(a.mass_window.has_value(), options),
          top(options),
          top(integers),
          a.column_sum ? at::empty_symint({batch, heads, a.key.sym_size(2)}, options) : at::empty({0}, options)};
}

// What attention_weights_forward writes.
inline WeightsResult empty_weights(const WeightsArguments& a) {
  const SymInt batch = a.query.sym_size(0), heads = a.query.sym_size(1), length = a.query.sym_size(2);
  const auto options = a.query.options();
  const auto weights = a.mean ? at::empty_symint({batch, length, a.key.sym_size(2)}, options)
                              : at::empty_symint({batch, heads, length, a.key.sym_size(2)}, options);
  return {weights, at::empty_symint({batch, heads, length}, options.dtype(accumulator_type(a.query.scalar_type())))};
}

// What attention_with_weights_forward writes.
inline WithWeightsResult empty_with_weights(const WithWeightsArguments& a) {
  const auto [weights, logsumexp] = empty_weights(a.weights(std::nullopt));
  const Tensor out = empty_by_row(a.query.sym_size(0), a.query.sym_size(1), a.query.sym_size(2), a.value.sym_size(3),
                                  a.query.options());
  return {out, weights, logsumexp};
}

}  // namespace torch_attn::ops
