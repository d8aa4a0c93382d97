// The checks of hard attention's operators; see check.h.
#include "ops/selection.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "ops/check.h"

namespace torch_attn::ops {
namespace {

void check_at_least_one(int64_t number, const char* name, const char* op) {
  TORCH_CHECK_VALUE(number >= 1, op, ": ", name, " must be at least 1, but it is ", number, ".");
}

}  // namespace

void check_arguments(const SelectArguments& a) {
  check_arguments(a.forward());
  check_at_least_one(a.count, "count", "select_keys");
  if (is_defined(a.rng_state)) check_rng_state(*a.rng_state, "select_keys");
}

void check_arguments(const SelectBackwardArguments& a) {
  const ForwardArguments forward = a.forward();
  check_arguments(forward);
  const Sizes s = Sizes::of(forward);
  const auto accumulator = accumulator_type(a.query.scalar_type());
  const auto check_one = [&](const Tensor& tensor, const char* name, at::ScalarType type, bool per_choice) {
    std::vector<SymInt> expected = {s.batch, s.heads, s.query_length};
    if (per_choice) expected.push_back(a.indices.sym_size(-1));
    TORCH_CHECK(has_shape(tensor, expected), "select_keys_backward: ", name, " must have shape ", shape_text(expected),
                ", but its shape is ", shape_text(tensor), ".");
    TORCH_CHECK(tensor.scalar_type() == type, "select_keys_backward: ", name, " must be ", type, ", but it is ",
                tensor.scalar_type(), ".");
  };
  TORCH_CHECK(a.indices.dim() == 4, "select_keys_backward: indices must have 4 dimensions, but its shape is ",
              shape_text(a.indices), ".");
  check_one(a.indices, "indices", at::kLong, true);
  check_one(a.entropy, "entropy", accumulator, false);
  check_one(a.logsumexp, "logsumexp", accumulator, false);
  if (is_defined(a.grad_scores)) check_one(*a.grad_scores, "grad_scores", accumulator, true);
  if (is_defined(a.grad_log_prob)) check_one(*a.grad_log_prob, "grad_log_prob", accumulator, true);
  if (is_defined(a.grad_entropy)) check_one(*a.grad_entropy, "grad_entropy", accumulator, false);
  if (is_defined(a.grad_logsumexp)) check_one(*a.grad_logsumexp, "grad_logsumexp", accumulator, false);

  const OptionalTensor inputs[] = {a.query, a.key, a.options.attn_mask, a.options.alibi_slopes, a.options.sinks};
  constexpr const char* names[] = {"query", "key", "attn_mask", "alibi_slopes", "sinks"};
  for (size_t i = 0; i < kSelectGradients.size(); ++i) {
    TORCH_CHECK(!a.output_mask[i] || (is_defined(inputs[i]) && at::isFloatingType(inputs[i]->scalar_type())),
                "select_keys_backward: output_mask asks for the gradient of ", names[i], ", but ", names[i],
                is_defined(inputs[i]) ? " is not of a floating dtype." : " is None.");
  }
}

void check_arguments(const GatherArguments& a) {
  const auto check_dims = [](const Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() == 4, "gather_values: ", name, " must have 4 dimensions, but its shape is ", shape_text(t),
                ".");
  };
  check_dims(a.value, "value");
  check_dims(a.indices, "indices");
  TORCH_CHECK(a.indices.scalar_type() == at::kLong, "gather_values: indices must be int64, but it is ",
              a.indices.scalar_type(), ".");
  const SymInt heads = a.indices.sym_size(1), kv_heads = a.value.sym_size(1);
  TORCH_CHECK(a.value.sym_size(0).sym_eq(a.indices.sym_size(0)).expect_true(__FILE__, __LINE__) &&
                  (heads == kv_heads || (kv_heads != 0 && heads % kv_heads == 0)),
              "gather_values: indices must have value's batch size and a multiple of its heads, but their shapes are ",
              shape_text(a.indices), " and ", shape_text(a.value), ".");
  if (!is_defined(a.weights)) return;
  TORCH_CHECK(has_shape(*a.weights, a.indices.sym_sizes()), "gather_values: weights must have the shape of indices, ",
              shape_text(a.indices), ", but its shape is ", shape_text(*a.weights), ".");
  TORCH_CHECK(a.weights->scalar_type() == accumulator_type(a.value.scalar_type()), "gather_values: weights must be ",
              accumulator_type(a.value.scalar_type()), ", but it is ", a.weights->scalar_type(), ".");
}

void check_arguments(const GatherBackwardArguments& a) {
  check_arguments(a.forward());
  const std::vector<SymInt> expected = {a.indices.sym_size(0), a.indices.sym_size(1), a.indices.sym_size(2),
                                        a.value.sym_size(3)};
  TORCH_CHECK(has_shape(a.grad_out, expected) && a.grad_out.scalar_type() == a.value.scalar_type(),
              "gather_values_backward: grad_out must be ", a.value.scalar_type(), " of shape ", shape_text(expected),
              ", but it is ", a.grad_out.scalar_type(), " of shape ", shape_text(a.grad_out), ".");
  TORCH_CHECK(!a.output_mask[1] || is_defined(a.weights),
              "gather_values_backward: output_mask asks for the gradient of weights, but weights is None.");
}

void check_arguments(const NoiseArguments& a) {
  check_rng_state(a.rng_state, "selection_noise");
  check_at_least_one(a.count, "count", "selection_noise");
}

void check_arguments(const HardAttentionArguments& a) {
  constexpr std::string_view estimators[] = {"reinforce", "straight_through", "argmax", "top_k"};
  TORCH_CHECK_VALUE(std::find(std::begin(estimators), std::end(estimators), a.estimator) != std::end(estimators),
                    "hard_attention: estimator must be \"reinforce\", \"straight_through\", \"argmax\" or \"top_k\", "
                    "but it is \"",
                    a.estimator, "\".");
  check_at_least_one(a.num_samples, "num_samples", "hard_attention");
  check_at_least_one(a.k, "k", "hard_attention");
  TORCH_CHECK_VALUE(a.temperature > 0 && std::isfinite(a.temperature),
                    "hard_attention: temperature must be positive and finite, but it is ", a.temperature, ".");
}

}  // namespace torch_attn::ops
