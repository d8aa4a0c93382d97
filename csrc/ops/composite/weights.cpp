#include "ops/composite/weights.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymFloat.h>

#include <limits>

#include "core/dropout.h"
#include "ops/check.h"
#include "ops/operators.h"
#include "ops/outputs.h"

namespace torch_attn::ops::composite {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Which keys a row may attend by its position, and how far away they are (core/mask.h's BandMask).
struct Band {
  Tensor allowed;         // (1 or B, 1, L, S); undefined: all
  Tensor minus_distance;  // the same shape: -|position - key|, for ALiBi
};

Band make_band(const ForwardArguments& a, const Sizes& s, const SelectedRows& selected) {
  const Options& o = a.options;
  const auto integers = a.query.options().dtype(at::kLong);
  const Tensor key = at::arange(s.key_length, integers);
  const SymInt query_length = selected.query_length.value_or(s.query_length);
  Tensor position = (is_defined(selected.rows) ? *selected.rows : at::arange(s.query_length, integers)).unsqueeze(1);
  Tensor lengths;
  if (is_defined(o.key_lengths)) lengths = o.key_lengths->to(at::kLong).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight)
    position = position +
               (lengths.defined() ? lengths - query_length : at::scalar_tensor(s.key_length - query_length, integers));

  Band band;
  const auto restrict_to = [&band](const Tensor& allowed) {
    band.allowed = band.allowed.defined() ? band.allowed.logical_and(allowed) : allowed;
  };
  if (o.is_causal)
    restrict_to(key <= position);
  else if (o.window_right.has_value())
    restrict_to(key <= position + *o.window_right);
  if (o.window_left.has_value()) restrict_to(key >= position - *o.window_left);
  if (lengths.defined()) restrict_to(key < lengths);
  band.minus_distance = (position - key).abs().neg();
  return band;
}

}  // namespace

Tensor expand_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unsqueeze(2).expand_symint({-1, -1, s.heads / s.kv_heads, -1, -1}).flatten(1, 2);
}
Tensor sum_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unflatten_symint(1, {s.kv_heads, s.heads / s.kv_heads}).sum(2);
}

Tensor per_head(const Tensor& t, at::ScalarType type) {
  const Tensor converted = t.to(type).unsqueeze(-1).unsqueeze(-1);
  return converted.dim() == 4 ? converted : converted.unsqueeze(0);
}

Weights compute_weights(const ForwardArguments& a, const Tensor& rng_state, const SelectedRows& selected) {
  const Options& o = a.options;
  const Sizes s = Sizes::of(a);
  const auto accumulator = accumulator_type(a.query.scalar_type());
  Weights w;
  w.sizes = s;
  w.dtype = a.query.scalar_type();
  w.softcap = o.softcap;
  w.query = a.query.to(accumulator);
  w.key = expand_kv_heads(a.key.to(accumulator), s);
  w.value = expand_kv_heads(a.value.to(accumulator), s);
  w.scale =
      o.scale.has_value() ? c10::Scalar(*o.scale) : c10::Scalar(c10::SymFloat(1.0) / c10::SymFloat(s.head_dim).sqrt());

  w.capped = at::matmul(w.query * w.scale, w.key.transpose(-2, -1));
  if (o.softcap > 0) w.capped = at::tanh(w.capped / o.softcap) * o.softcap;

  Band band = make_band(a, s, selected);
  w.minus_distance = band.minus_distance;
  Tensor logits = w.capped;
  if (is_defined(o.alibi_slopes)) logits = logits + band.minus_distance * per_head(*o.alibi_slopes, accumulator);
  if (is_defined(o.attn_mask)) {
    if (o.attn_mask->scalar_type() == at::kBool)
      band.allowed = band.allowed.defined() ? band.allowed.logical_and(*o.attn_mask) : *o.attn_mask;
    else
      logits = logits + o.attn_mask->to(accumulator);
  }
  const auto minus_infinity = at::scalar_tensor(-kInfinity, logits.options());
  if (band.allowed.defined()) logits = at::where(band.allowed, logits, minus_infinity);
  w.scores = logits;
  if (is_defined(o.sinks)) {
    const Tensor sinks = per_head(*o.sinks, accumulator);
    logits = at::cat({logits, sinks.expand_symint({s.batch, s.heads, s.query_length, 1})}, -1);
  }

  // A softmax over nothing but -inf is NaN, and so are its derivatives: put 0 in such rows before, the results after.
  w.is_empty = (logits == -kInfinity).all(-1, /*keepdim=*/true);
  w.logits = logits = logits.masked_fill(w.is_empty, 0);
  w.logsumexp = at::logsumexp(logits, {-1}, /*keepdim=*/true).masked_fill(w.is_empty, -kInfinity);
  w.weights = at::softmax(logits, -1).masked_fill(w.is_empty, 0);
  if (is_defined(o.sinks)) {
    w.sink_weights = w.weights.narrow_symint(-1, s.key_length, 1);
    w.weights = w.weights.narrow_symint(-1, 0, s.key_length);
  }
  if (o.dropout_p > 0)
    w.kept = DropoutKeepMask::call({rng_state, s.batch, s.heads, s.query_length, s.key_length, o.dropout_p})
                 .to(accumulator) *
             Dropout::keep_scale(o.dropout_p);
  return w;
}

Tensor by_row(const Tensor& t, at::ScalarType type) { return t.to(type).transpose(1, 2).contiguous().transpose(1, 2); }

Tensor sum_to(const Tensor& t, const Tensor& like) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < 4; ++dim)
    if (TORCH_GUARD_OR_FALSE(like.sym_size(dim).sym_eq(1))) dims.push_back(dim);
  return (dims.empty() ? t : t.sum(dims, /*keepdim=*/true)).to(like.scalar_type());
}

}  // namespace torch_attn::ops::composite
