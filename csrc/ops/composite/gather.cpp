#include "ops/composite/gather.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/zeros.h>
#include <c10/core/SymBool.h>

#include "ops/composite/weights.h"

namespace torch_attn::ops::composite {
namespace {

// The choices of all query heads that share a source head, in a row: (B, Hkv, Hq / Hkv · R · count).
struct Choices {
  SymInt heads, rows, count, kv_heads, keys, columns;
  Tensor invalid, place;

  Choices(const Tensor& value, const Tensor& indices)
      : heads(indices.sym_size(1)),
        rows(indices.sym_size(2)),
        count(indices.sym_size(3)),
        kv_heads(value.sym_size(1)),
        keys(value.sym_size(2)),
        columns(value.sym_size(3)),
        invalid((indices < 0).logical_or(indices >= keys)) {
    if (is_empty()) return;
    const SymInt together = heads / kv_heads * rows * count;
    place = indices.masked_fill(invalid, 0).reshape_symint({value.sym_size(0), kv_heads, together, 1});
    place = place.expand_symint({-1, -1, -1, columns});
  }
  bool is_empty() const { return TORCH_GUARD_OR_FALSE(keys.sym_eq(0)) || TORCH_GUARD_OR_FALSE(kv_heads.sym_eq(0)); }
  // (B, Hq, R, count, columns); what is no key is 0.
  Tensor gather(const Tensor& value) const {
    const SymInt batch = invalid.sym_size(0);
    if (is_empty()) return at::zeros_symint({batch, heads, rows, count, columns}, value.options());
    const Tensor gathered = value.gather(2, place).reshape_symint({batch, heads, rows, count, columns});
    return gathered.masked_fill(invalid.unsqueeze(-1), 0);
  }
};

}  // namespace

Tensor gather_values(const GatherArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const auto accumulator = accumulator_type(a.value.scalar_type());
  Tensor gathered = Choices(a.value, a.indices).gather(a.value.to(accumulator));
  if (is_defined(a.weights)) gathered = gathered * a.weights->unsqueeze(-1);
  return by_row(gathered.sum(-2), a.value.scalar_type());
}

GatherBackwardResult gather_values_backward(const GatherBackwardArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const auto accumulator = accumulator_type(a.value.scalar_type());
  const Choices choices(a.value, a.indices);
  const Tensor grad_out = a.grad_out.to(accumulator).unsqueeze(-2);
  Tensor grad_value = no_gradient(a.value), grad_weights = no_gradient(a.value);
  if (a.output_mask[0]) {
    grad_value = at::zeros_symint(a.value.sym_sizes(), a.value.options().dtype(accumulator));
    if (!choices.is_empty()) {
      Tensor weights = choices.invalid.logical_not().to(accumulator);
      if (is_defined(a.weights)) weights = weights * *a.weights;
      const Tensor added = grad_out * weights.unsqueeze(-1);
      grad_value = grad_value.scatter_add(2, choices.place, added.reshape_symint(choices.place.sym_sizes()));
    }
    grad_value = by_row(grad_value, a.value.scalar_type());
  }
  if (a.output_mask[1]) grad_weights = (choices.gather(a.value.to(accumulator)) * grad_out).sum(-1);
  return {grad_value, grad_weights};
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward>);
}

}  // namespace torch_attn::ops::composite
