// The shapes of hard attention's operators; see attention.cpp.
#include "core/selection.h"
#include "ops/check.h"
#include "ops/selection.h"

namespace torch_attn::ops {
namespace {

SelectResult select_keys_meta(const SelectArguments& a) {
  check_arguments(a);
  const Sizes s = Sizes::of(a.forward());
  const auto integers = a.query.options().dtype(at::kLong);
  const auto reals = a.query.options().dtype(accumulator_type(a.query.scalar_type()));
  const auto per_choice = [&](const at::TensorOptions& options) {
    return at::empty_symint({s.batch, s.heads, s.query_length, a.count}, options);
  };
  const auto per_row = [&] { return at::empty_symint({s.batch, s.heads, s.query_length}, reals); };
  return {per_choice(integers),
          per_choice(reals),
          per_choice(reals),
          per_row(),
          per_row(),
          at::empty({kRngStateSize}, integers)};
}

SelectBackwardResult select_keys_backward_meta(const SelectBackwardArguments& a) {
  check_arguments(a);
  const auto by_row = [&](size_t i, const Tensor& input) {
    return a.output_mask[i] ? empty_by_row_like(input) : no_gradient(a.query);
  };
  const auto contiguous = [&](size_t i, const OptionalTensor& input) {
    return a.output_mask[i] ? at::empty_symint(input->sym_sizes(), input->options()) : no_gradient(a.query);
  };
  return {by_row(0, a.query), by_row(1, a.key), contiguous(2, a.options.attn_mask),
          contiguous(3, a.options.alibi_slopes), contiguous(4, a.options.sinks)};
}

Tensor gather_values_meta(const GatherArguments& a) {
  check_arguments(a);
  return empty_by_row(a.indices.sym_size(0), a.indices.sym_size(1), a.indices.sym_size(2), a.value.sym_size(3),
                      a.value.options());
}

GatherBackwardResult gather_values_backward_meta(const GatherBackwardArguments& a) {
  check_arguments(a);
  return {a.output_mask[0] ? empty_by_row_like(a.value) : no_gradient(a.value),
          a.output_mask[1] ? at::empty_symint(a.weights->sym_sizes(), a.weights->options()) : no_gradient(a.value)};
}

Tensor selection_noise_meta(const NoiseArguments& a) {
  check_arguments(a);
  const SymInt sink = a.sink ? 1 : 0;
  const auto options = a.rng_state.options().dtype(at::kDouble);
  if (!a.replacement) return at::empty_symint({a.batch, a.heads, a.query_length, a.key_length + sink}, options);
  constexpr int64_t group = SelectionNoise::kGroupKeys;
  const SymInt groups = ((a.key_length + (group - 1)) / group).max(SymInt(1)) + sink;
  return at::empty_symint({a.batch, a.heads, a.query_length, a.count, groups, 2}, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Meta, m) {
  m.impl("select_keys", SelectKeys::kernel<select_keys_meta>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward_meta>);
  m.impl("gather_values", GatherValues::kernel<gather_values_meta>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward_meta>);
  m.impl("selection_noise", NoiseOfSelection::kernel<selection_noise_meta>);
}

}  // namespace torch_attn::ops
