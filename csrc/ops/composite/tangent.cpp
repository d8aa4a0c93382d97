// The tangents of formula.cpp's two functions, by the product rule.
#include <ATen/ops/matmul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/zeros_like.h>

#include "ops/check.h"
#include "ops/composite/formula.h"
#include "ops/composite/weights.h"
#include "ops/operators.h"
#include "ops/packed.h"

namespace torch_attn::ops::composite {
namespace {

// The sum of products of pairs, without those of which a factor is undefined (zero); undefined if none is left.
template <class Product>
Tensor sum_of(std::initializer_list<std::pair<Tensor, Tensor>> pairs, Product&& product) {
  Tensor sum;
  for (const auto& [left, right] : pairs) {
    if (!left.defined() || !right.defined()) continue;
    const Tensor term = product(left, right);
    sum = sum.defined() ? sum + term : term;
  }
  return sum;
}
Tensor matmuls(std::initializer_list<std::pair<Tensor, Tensor>> pairs) {
  return sum_of(pairs, [](const Tensor& left, const Tensor& right) { return at::matmul(left, right); });
}
Tensor transposed(const Tensor& t) { return t.defined() ? t.transpose(-2, -1) : t; }
Tensor or_zeros(const Tensor& t, const Tensor& like) { return t.defined() ? t : at::zeros_like(like); }

// Tangents of what Weights holds.
struct WeightTangents {
  Tensor query, key, value;  // of the inputs, as Weights has them; undefined: zero
  Tensor capped;             // undefined: zero
  Tensor weights;
  Tensor logsumexp;     // (B, Hq, L, 1); 0 in empty rows
  Tensor sink_weights;  // undefined without sinks
};

WeightTangents compute_tangents(const Weights& w, const Tangents& t, const Options& o) {
  const auto accumulator = w.query.scalar_type();
  const auto converted = [&](const OptionalTensor& tensor) {
    return is_defined(tensor) ? tensor->to(accumulator) : Tensor();
  };
  const auto expanded = [&](const Tensor& tensor) {
    return tensor.defined() ? expand_kv_heads(tensor, w.sizes) : tensor;
  };
  WeightTangents r;
  r.query = converted(t.query);
  r.key = expanded(converted(t.key));
  r.value = expanded(converted(t.value));

  r.capped = matmuls({{r.query, transposed(w.key)}, {w.query, transposed(r.key)}});
  if (r.capped.defined()) {
    r.capped = r.capped * w.scale;
    if (w.softcap > 0) r.capped = r.capped * at::rsub((w.capped / w.softcap).square(), 1);
  }
  Tensor scores = or_zeros(r.capped, w.weights);
  if (is_defined(t.alibi_slopes)) scores = scores + w.minus_distance * per_head(*t.alibi_slopes, w, o);
  if (is_defined(t.attn_mask)) scores = scores + t.attn_mask->to(accumulator);

  r.logsumexp = (w.weights * scores).sum(-1, /*keepdim=*/true);
  const Tensor sinks = is_defined(t.sinks) ? per_head(*t.sinks, w, o) : Tensor();
  if (sinks.defined()) r.logsumexp = r.logsumexp + w.sink_weights * sinks;
  r.weights = w.weights * (scores - r.logsumexp);
  if (w.sink_weights.defined())
    r.sink_weights = w.sink_weights * (sinks.defined() ? sinks - r.logsumexp : r.logsumexp.neg());
  return r;
}

}  // namespace

JvpResult attention_jvp(const JvpArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Weights w = compute_weights(a.forward(), a.rng_state);
  const WeightTangents t = compute_tangents(w, a.tangents, a.options);
  const auto type = a.query.scalar_type();
  const Tensor tangent_out = matmuls({{w.drop(t.weights), w.value}, {w.drop(w.weights), t.value}});
  return {by_row(at::matmul(w.drop(w.weights), w.value), type), w.logsumexp.squeeze(-1), by_row(tangent_out, type),
          t.logsumexp.squeeze(-1)};
}

BackwardResult attention_backward_jvp(const BackwardJvpArguments& a) {
  const NoAutocast no_autocast;
  check_arguments(a);
  const Options& o = a.options;
  const Weights w = compute_weights(a.backward().forward(), a.rng_state);
  const WeightTangents t = compute_tangents(w, a.tangents, a.options);
  const auto accumulator = w.query.scalar_type();
  const auto row = [&](const OptionalTensor& tensor) {
    return is_defined(tensor) ? tensor->unsqueeze(-1).masked_fill(w.is_empty, 0) : Tensor();
  };
  const Tensor grad_out = a.grad_out.to(accumulator), grad_logsumexp = row(a.grad_logsumexp);
  const Tensor t_grad_out = is_defined(a.tangent_grad_out) ? a.tangent_grad_out->to(accumulator) : Tensor();
  const Tensor t_grad_logsumexp = row(a.tangent_grad_logsumexp);

  // attention_backward's intermediates, and their tangents.
  const Tensor grad_weights = w.drop(at::matmul(grad_out, transposed(w.value)));
  Tensor row_term = (w.weights * grad_weights).sum(-1, /*keepdim=*/true);
  if (grad_logsumexp.defined()) row_term = row_term - grad_logsumexp;
  const Tensor centred = grad_weights - row_term, grad_scores = w.weights * centred;

  const Tensor products = matmuls({{t_grad_out, transposed(w.value)}, {grad_out, transposed(t.value)}});
  const Tensor t_grad_weights = products.defined() ? w.drop(products) : at::zeros_like(grad_weights);
  Tensor t_row_term = (t.weights * grad_weights + w.weights * t_grad_weights).sum(-1, /*keepdim=*/true);
  if (t_grad_logsumexp.defined()) t_row_term = t_row_term - t_grad_logsumexp;
  const Tensor t_grad_scores = t.weights * centred + w.weights * (t_grad_weights - t_row_term);

  const auto type = a.query.scalar_type();
  const auto wanted = [&](Gradient gradient, auto&& compute) {
    return a.output_mask[gradient] ? compute() : no_gradient(a.query);
  };
  Tensor grad_dots, t_grad_dots;
  if (a.output_mask[kQuery] || a.output_mask[kKey]) {
    grad_dots = grad_scores * w.scale;
    t_grad_dots = t_grad_scores * w.scale;
    if (o.softcap > 0) {
      const Tensor tanh = w.capped / o.softcap, derivative = at::rsub(tanh.square(), 1);
      t_grad_dots = t_grad_dots * derivative;
      if (t.capped.defined()) t_grad_dots = t_grad_dots - grad_dots * tanh * t.capped * (2 / o.softcap);
      grad_dots = grad_dots * derivative;
    }
  }
  const auto over_kv_heads = [&](const Tensor& tensor) { return by_row(sum_kv_heads(tensor, w.sizes), type); };
  return {
      wanted(kQuery, [&] { return by_row(matmuls({{t_grad_dots, w.key}, {grad_dots, t.key}}), type); }),
      wanted(kKey,
             [&] {
               return over_kv_heads(matmuls({{transposed(t_grad_dots), w.query}, {transposed(grad_dots), t.query}}));
             }),
      wanted(kValue,
             [&] {
               return over_kv_heads(
                   matmuls({{transposed(w.drop(t.weights)), grad_out}, {transposed(w.drop(w.weights)), t_grad_out}}));
             }),
      wanted(kAttnMask, [&] { return sum_to(t_grad_scores, *o.attn_mask); }),
      wanted(kAlibiSlopes, [&] { return sum_of_rows((t_grad_scores * w.minus_distance).sum(-1), *o.alibi_slopes, o); }),
      wanted(kSinks,
             [&] {
               const Tensor by_row = t.sink_weights * row_term + w.sink_weights * t_row_term;
               return sum_of_rows(by_row.squeeze(-1).neg(), *o.sinks, o);
             }),
  };
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) {
  m.impl("attention_jvp", AttentionJvp::kernel<attention_jvp>);
  m.impl("attention_backward_jvp", AttentionBackwardJvp::kernel<attention_backward_jvp>);
}

}  // namespace torch_attn::ops::composite
