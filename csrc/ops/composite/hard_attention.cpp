// torch_attn::hard_attention, which users call: select_keys, and what becomes of the chosen keys' values. ATen
// operators around it, so every transform applies.
#include <ATen/TensorOperators.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/composite/canonical.h"
#include "ops/selection.h"

namespace torch_attn::ops {
namespace {

// Without columns every score is 0.
double default_scale(const Tensor& query) {
  const int64_t dim = query.sym_size(-1).guard_int(__FILE__, __LINE__);
  return dim > 0 ? 1 / std::sqrt(static_cast<double>(dim)) : 1.0;
}

// The scores divided by the temperature are those of an ordinary call:
// softcap · tanh(x / softcap) / T = (softcap / T) · tanh((x / T) / (softcap / T)).
ScoreOptions with_temperature(ScoreOptions o, double temperature, const Tensor& query) {
  if (temperature == 1) return o;
  const auto accumulator = accumulator_type(query.scalar_type());
  const auto divided = [&](const OptionalTensor& t) {
    return is_defined(t) && at::isFloatingType(t->scalar_type()) ? OptionalTensor(t->to(accumulator) / temperature) : t;
  };
  const double scale = o.scale.has_value() ? *o.scale : default_scale(query);
  o.scale = scale / temperature;
  o.softcap /= temperature;
  o.attn_mask = divided(o.attn_mask);
  o.alibi_slopes = divided(o.alibi_slopes);
  o.sinks = divided(o.sinks);
  return o;
}

// The weights of the chosen keys alone.
Tensor renormalised(const Tensor& scores) {
  const Tensor nothing = scores == -std::numeric_limits<double>::infinity();
  return at::softmax(scores.masked_fill(nothing.all(-1, /*keepdim=*/true), 0), -1).masked_fill(nothing, 0);
}

bool is_differentiated(const ForwardArguments& a) {
  const OptionalTensor inputs[] = {a.query, a.key, a.options.attn_mask, a.options.alibi_slopes, a.options.sinks};
  return std::any_of(std::begin(inputs), std::end(inputs), [](const OptionalTensor& t) {
    return is_defined(t) && ((at::GradMode::is_enabled() && t->requires_grad()) || t->_fw_grad(/*level=*/0).defined());
  });
}

HardAttentionResult hard_attention(const HardAttentionArguments& a) {
  check_arguments(a);
  const Canonical canonical(a.attention());
  ForwardArguments f = canonical.arguments();
  const ScoreOptions options = with_temperature(ScoreOptions::of(f.options), a.temperature, f.query);
  f.options = Options{options.options()};

  const bool straight_through = a.estimator == "straight_through", top_k = a.estimator == "top_k";
  const bool sample = straight_through || a.estimator == "reinforce";
  const int64_t count = sample ? a.num_samples : top_k ? a.k : 1;
  OptionalTensor rng_state;
  if (sample && a.generator.has_value()) rng_state = make_rng_state(true, f.query, a.generator);
  const auto [indices, scores, log_prob, entropy, logsumexp, used_state] =
      SelectKeys::call({f.query, f.key, options, count, sample, a.replacement, rng_state});

  // One output for each draw, or one for all that are taken.
  Tensor output = top_k ? GatherValues::call({f.value, indices, renormalised(scores)}).unsqueeze(-2)
                        : GatherValues::call({f.value, indices.flatten(2).unsqueeze(-1), std::nullopt})
                              .unflatten_symint(2, {f.query.sym_size(2), count});
  if (straight_through && is_differentiated(f)) {
    // The difference is 0, and has the gradient of soft attention.
    const Tensor soft =
        std::get<0>(AttentionForward::call({f.query, f.key, f.value.detach(), f.options, std::nullopt}));
    output = output + (soft - soft.detach()).unsqueeze(-2);
  }

  const auto samples_first = [](const Tensor& t, int64_t dim) {
    return t.sym_size(dim) == 1 ? t.squeeze(dim) : t.movedim(dim, 0);
  };
  const Tensor public_indices = has_sink(options) ? indices.masked_fill(indices == f.key.sym_size(2), -1) : indices;
  const auto choices = [&](const Tensor& t) {
    return top_k ? canonical.restore(t) : samples_first(canonical.restore(t), -1);
  };
  return {samples_first(canonical.restore(output), -2), choices(public_indices), choices(log_prob),
          canonical.restore(entropy)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) {
  m.impl("hard_attention", HardAttention::kernel<hard_attention>);
}
// vmap: the alias above does not cover it.
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("hard_attention", HardAttention::kernel<hard_attention>);
}

}  // namespace torch_attn::ops
