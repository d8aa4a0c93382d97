// Allocation of what the operators return, shared by the kernels and their meta versions so that the layouts agree.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "ops/arguments.h"

namespace torch_attn::ops {

// (batch, heads, length, dim), laid out as (batch, length, heads, dim): out.transpose(1, 2).flatten(2), what a
// transformer layer does next, is then a view. torch's scaled_dot_product_attention lays its output out like this, too.
inline Tensor empty_by_row(const SymInt& batch, const SymInt& heads, const SymInt& length, const SymInt& dim,
                           const at::TensorOptions& options) {
  const SymInt row = heads * dim;
  return at::empty_strided_symint({batch, heads, length, dim}, {length * row, dim, row, 1}, options);
}
inline Tensor empty_by_row_like(const Tensor& t) {
  return empty_by_row(t.sym_size(0), t.sym_size(1), t.sym_size(2), t.sym_size(3), t.options());
}

// What stands for a gradient that output_mask does not ask for.
inline Tensor no_gradient(const Tensor& query) { return at::empty({0}, query.options()); }

// A gradient (B, Hq) to the shape and dtype of the input it belongs to, (Hq) or (B, Hq).
inline Tensor per_head_gradient(const Tensor& gradient, const Tensor& input) {
  return (input.dim() == 2 ? gradient : gradient.sum(0)).to(input.scalar_type());
}

// (seed, offset, batch period) of a call's random bits: the seed is drawn with the device's default generator once per
// call; zeros where it needs none. A period n makes batch entry b share the bits of b modulo n; 0: each entry has its
// own. Operators, not generator calls, so that vmap's randomness modes and tracing apply.
inline Tensor make_rng_state(bool is_random, const Tensor& query,
                             const std::optional<at::Generator>& generator = std::nullopt) {
  const auto options = query.options().dtype(at::kLong);
  if (!is_random) return at::zeros({kRngStateSize}, options);
  const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, generator, options);
  return at::constant_pad_nd(seed, {0, kRngStateSize - 1});
}

// The state that the call was given, as an output of its own, or a new one.
inline Tensor rng_state_of(const ForwardArguments& a) {
  return is_defined(a.rng_state) ? a.rng_state->clone() : make_rng_state(a.options.dropout_p > 0, a.query);
}

}  // namespace torch_attn::ops
