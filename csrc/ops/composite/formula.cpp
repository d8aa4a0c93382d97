#include "ops/composite/formula.h"

#include <ATen/TensorOperators.h>
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

// matmul and others must run in the accumulator type, whatever autocast says.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// Each query head's own key or value head: (B, Hkv, S, D) -> (B, Hq, S, D).
Tensor expand_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unsqueeze(2).expand_symint({-1, -1, s.heads / s.kv_heads, -1, -1}).flatten(1, 2);
}
// Its transpose.
Tensor sum_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unflatten_symint(1, {s.kv_heads, s.heads / s.kv_heads}).sum(2);
}

// Which keys a row may attend by its position, and how far away they are (core/mask.h's BandMask).
struct Band {
  Tensor allowed;         // (1 or B, 1, L, S); undefined: all
  Tensor minus_distance;  // the same shape: -|position - key|, for ALiBi
};

Band make_band(const ForwardArguments& a, const Sizes& s) {
  const Options& o = a.options;
  const auto integers = a.query.options().dtype(at::kLong);
  const Tensor key = at::arange(s.key_length, integers);
  Tensor position = at::arange(s.query_length, integers).unsqueeze(1);
  Tensor lengths;
  if (is_defined(o.key_lengths)) lengths = o.key_lengths->to(at::kLong).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight)
    position = position + (lengths.defined() ? lengths - s.query_length
                                             : at::scalar_tensor(s.key_length - s.query_length, integers));

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

// Everything between the inputs and out, in the accumulator type and with Hq heads.
struct Weights {
  Tensor query, key, value;
  c10::Scalar scale;
  Tensor capped;  // softcap(scale · q·k)
  Tensor minus_distance;
  Tensor weights;       // the softmax; 0 in empty rows
  Tensor sink_weights;  // (B, Hq, L, 1): the sink's share; undefined without sinks
  Tensor kept;          // what dropout multiplies the weights by; undefined without dropout
  Tensor logsumexp;     // (B, Hq, L, 1)
  Tensor is_empty;      // (B, Hq, L, 1): no key is attended and no sink is there

  Tensor drop(const Tensor& t) const { return kept.defined() ? t * kept : t; }
};

Weights compute_weights(const ForwardArguments& a, const Sizes& s, const Tensor& rng_state) {
  const Options& o = a.options;
  const auto accumulator = accumulator_type(a.query.scalar_type());
  Weights w;
  w.query = a.query.to(accumulator);
  w.key = expand_kv_heads(a.key.to(accumulator), s);
  w.value = expand_kv_heads(a.value.to(accumulator), s);
  w.scale =
      o.scale.has_value() ? c10::Scalar(*o.scale) : c10::Scalar(c10::SymFloat(1.0) / c10::SymFloat(s.head_dim).sqrt());

  w.capped = at::matmul(w.query * w.scale, w.key.transpose(-2, -1));
  if (o.softcap > 0) w.capped = at::tanh(w.capped / o.softcap) * o.softcap;

  Band band = make_band(a, s);
  w.minus_distance = band.minus_distance;
  Tensor logits = w.capped;
  if (is_defined(o.alibi_slopes))
    logits = logits + band.minus_distance * o.alibi_slopes->to(accumulator).unsqueeze(-1).unsqueeze(-1);
  if (is_defined(o.attn_mask)) {
    if (o.attn_mask->scalar_type() == at::kBool)
      band.allowed = band.allowed.defined() ? band.allowed.logical_and(*o.attn_mask) : *o.attn_mask;
    else
      logits = logits + o.attn_mask->to(accumulator);
  }
  const auto minus_infinity = at::scalar_tensor(-kInfinity, logits.options());
  if (band.allowed.defined()) logits = at::where(band.allowed, logits, minus_infinity);
  if (is_defined(o.sinks)) {
    const Tensor sinks = o.sinks->to(accumulator).unsqueeze(-1).unsqueeze(-1).unsqueeze(0);
    logits = at::cat({logits, sinks.expand_symint({s.batch, s.heads, s.query_length, 1})}, -1);
  }

  // A softmax over nothing but -inf is NaN, and so are its derivatives: put 0 in such rows before, the results after.
  w.is_empty = (logits == -kInfinity).all(-1, /*keepdim=*/true);
  logits = logits.masked_fill(w.is_empty, 0);
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

// To the dtype and the layout that outputs.h's empty_by_row gives.
Tensor by_row(const Tensor& t, at::ScalarType type) { return t.to(type).transpose(1, 2).contiguous().transpose(1, 2); }

// The sum of t over the dimensions that like was broadcast in.
Tensor sum_to(const Tensor& t, const Tensor& like) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < 4; ++dim)
    if (TORCH_GUARD_OR_FALSE(like.sym_size(dim).sym_eq(1))) dims.push_back(dim);
  return dims.empty() ? t : t.sum(dims, /*keepdim=*/true);
}

}  // namespace

ForwardResult attention_forward(const ForwardArguments& a) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  check_arguments(a);
  const Sizes s = Sizes::of(a);
  const Tensor rng_state = make_rng_state(a.options.dropout_p, a.query);
  const Weights w = compute_weights(a, s, rng_state);
  const Tensor out = at::matmul(w.drop(w.weights), w.value);
  return {by_row(out, a.query.scalar_type()), w.logsumexp.squeeze(-1), rng_state};
}

BackwardResult attention_backward(const BackwardArguments& a) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  check_arguments(a);
  const ForwardArguments forward = a.forward();
  const Options& o = a.options;
  const Sizes s = Sizes::of(forward);
  const Weights w = compute_weights(forward, s, a.rng_state);
  const Tensor grad_out = a.grad_out.to(w.query.scalar_type());

  // With W = kept · P: grad P = kept · (grad_out Vᵀ); softmax: grad S = P · (grad P - rowsum(P · grad P)); and
  // d logsumexp / d S = P.
  const Tensor grad_weights = w.drop(at::matmul(grad_out, w.value.transpose(-2, -1)));
  Tensor row_term = (w.weights * grad_weights).sum(-1, /*keepdim=*/true);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - a.grad_logsumexp->unsqueeze(-1).masked_fill(w.is_empty, 0);
  const Tensor grad_scores = w.weights * (grad_weights - row_term);

  const auto type = a.query.scalar_type();
  const auto wanted = [&](Gradient gradient, auto&& compute) {
    return a.output_mask[gradient] ? compute() : no_gradient(a.query);
  };
  Tensor grad_dots;
  if (a.output_mask[kQuery] || a.output_mask[kKey]) {
    grad_dots = grad_scores * w.scale;
    if (o.softcap > 0) grad_dots = grad_dots * at::rsub((w.capped / o.softcap).square(), 1);
  }
  return {
      wanted(kQuery, [&] { return by_row(at::matmul(grad_dots, w.key), type); }),
      wanted(kKey, [&] { return by_row(sum_kv_heads(at::matmul(grad_dots.transpose(-2, -1), w.query), s), type); }),
      wanted(kValue,
             [&] { return by_row(sum_kv_heads(at::matmul(w.drop(w.weights).transpose(-2, -1), grad_out), s), type); }),
      wanted(kAttnMask, [&] { return sum_to(grad_scores, *o.attn_mask).to(o.attn_mask->scalar_type()); }),
      wanted(kAlibiSlopes,
             [&] {
               const Tensor per_batch = (grad_scores * w.minus_distance).sum({-2, -1});
               return (o.alibi_slopes->dim() == 2 ? per_batch : per_batch.sum(0)).to(o.alibi_slopes->scalar_type());
             }),
      wanted(kSinks, [&] { return (w.sink_weights * row_term).sum({0, 2, 3}).neg().to(o.sinks->scalar_type()); }),
  };
}

Tensor dropout_keep_mask(const DropoutArguments& a) {
  DropoutArguments on_cpu = a;
  on_cpu.rng_state = a.rng_state.cpu();
  return DropoutKeepMask::call(on_cpu).to(a.rng_state.device());
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask>);
}

// vmap: the formula's operators have batching rules.
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatched, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward>);
}

}  // namespace torch_attn::ops::composite
