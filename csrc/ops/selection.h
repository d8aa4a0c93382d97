// The operators behind hard attention: their arguments and their types, as ops/arguments.h and ops/operators.h hold
// those of soft attention. Included by the file named after them in each layer.
#pragma once

#include <ATen/core/Generator.h>

#include "ops/outputs.h"
#include "ops/score_options.h"

namespace torch_attn::ops {

// torch_attn::select_keys
struct SelectArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&>, ScoreOptions::Types>,
                             TypeList<int64_t, bool, bool, const OptionalTensor&>>;

  Tensor query, key;
  ScoreOptions options;
  int64_t count = 1;
  bool sample = false;       // else the highest scores
  bool replacement = false;  // of sample
  OptionalTensor rng_state;  // of an earlier call, to draw the same; none: drawn

  auto flat() const {
    return std::tuple_cat(std::tie(query, key), options.flat(), std::tie(count, sample, replacement, rng_state));
  }
  ForwardArguments forward() const { return without_value(query, key, options); }
};
// indices, scores, log_prob (B, Hq, L, count); entropy, logsumexp (B, Hq, L); rng_state
using SelectResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The inputs of select_keys that have a gradient, in the order of select_keys_backward's output_mask and results.
constexpr std::array<Gradient, 5> kSelectGradients = {kQuery, kKey, kAttnMask, kAlibiSlopes, kSinks};
using SelectOutputMask = std::array<bool, kSelectGradients.size()>;

// torch_attn::select_keys_backward
struct SelectBackwardArguments {
  using Types = Concatenated<
      Concatenated<TypeList<const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&>,
                   ScoreOptions::Types>,
      TypeList<SelectOutputMask>>;

  OptionalTensor grad_scores, grad_log_prob, grad_entropy, grad_logsumexp;
  Tensor query, key, indices, entropy, logsumexp;
  ScoreOptions options;
  SelectOutputMask output_mask{};

  auto flat() const {
    return std::tuple_cat(
        std::tie(grad_scores, grad_log_prob, grad_entropy, grad_logsumexp, query, key, indices, entropy, logsumexp),
        options.flat(), std::tie(output_mask));
  }
  ForwardArguments forward() const { return without_value(query, key, options); }
  bool any_gradient() const {
    return is_defined(grad_scores) || is_defined(grad_log_prob) || is_defined(grad_entropy) ||
           is_defined(grad_logsumexp);
  }
};
// One tensor per kSelectGradients; an unwanted one has shape (0).
using SelectBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// torch_attn::gather_values
struct GatherArguments {
  using Types = TypeList<const Tensor&, const Tensor&, const OptionalTensor&>;

  Tensor value, indices;   // indices that are no key read 0
  OptionalTensor weights;  // of indices' shape, accumulator type; none: 1

  auto flat() const { return std::tie(value, indices, weights); }
};

// torch_attn::gather_values_backward
struct GatherBackwardArguments {
  using Types = TypeList<const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::array<bool, 2>>;

  Tensor grad_out, value, indices;
  OptionalTensor weights;
  std::array<bool, 2> output_mask{};

  auto flat() const { return std::tie(grad_out, value, indices, weights, output_mask); }
  GatherArguments forward() const { return {value, indices, weights}; }
};
using GatherBackwardResult = std::tuple<Tensor, Tensor>;  // of value and weights; an unwanted one has shape (0)

// torch_attn::selection_noise
struct NoiseArguments {
  using Types = TypeList<const Tensor&, SymInt, SymInt, SymInt, SymInt, int64_t, bool, bool>;

  Tensor rng_state;
  SymInt batch, heads, query_length, key_length;
  int64_t count = 1;
  bool replacement = true;
  bool sink = false;

  auto flat() const { return std::tie(rng_state, batch, heads, query_length, key_length, count, replacement, sink); }
};

// torch_attn::hard_attention
struct HardAttentionArguments {
  using Types =
      Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&>, ScoreOptions::Types>,
                   TypeList<std::string_view, int64_t, bool, int64_t, double, std::optional<at::Generator>, bool>>;

  Tensor query, key, value;
  ScoreOptions options;
  std::string_view estimator = "reinforce";
  int64_t num_samples = 1;
  bool replacement = true;
  int64_t k = 1;
  double temperature = 1.0;
  std::optional<at::Generator> generator;
  bool enable_gqa = false;

  auto flat() const {
    return std::tuple_cat(std::tie(query, key, value), options.flat(),
                          std::tie(estimator, num_samples, replacement, k, temperature, generator, enable_gqa));
  }
  AttentionArguments attention() const { return {query, key, value, options.options(), enable_gqa}; }
};
using HardAttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // output, indices, log_prob, entropy

struct SelectKeys : Operator<SelectKeys, SelectArguments, SelectResult> {
  static constexpr const char* name = "torch_attn::select_keys";
};
struct SelectKeysBackward : Operator<SelectKeysBackward, SelectBackwardArguments, SelectBackwardResult> {
  static constexpr const char* name = "torch_attn::select_keys_backward";
};
struct GatherValues : Operator<GatherValues, GatherArguments, Tensor> {
  static constexpr const char* name = "torch_attn::gather_values";
};
struct GatherValuesBackward : Operator<GatherValuesBackward, GatherBackwardArguments, GatherBackwardResult> {
  static constexpr const char* name = "torch_attn::gather_values_backward";
};
struct NoiseOfSelection : Operator<NoiseOfSelection, NoiseArguments, Tensor> {
  static constexpr const char* name = "torch_attn::selection_noise";
};
struct HardAttention : Operator<HardAttention, HardAttentionArguments, HardAttentionResult> {
  static constexpr const char* name = "torch_attn::hard_attention";
};

void check_arguments(const SelectArguments& arguments);
void check_arguments(const SelectBackwardArguments& arguments);
void check_arguments(const GatherArguments& arguments);
void check_arguments(const GatherBackwardArguments& arguments);
void check_arguments(const NoiseArguments& arguments);
void check_arguments(const HardAttentionArguments& arguments);

// The state that the call was given, as an output of its own, or a new one.
inline Tensor rng_state_of(const SelectArguments& a) {
  return is_defined(a.rng_state) ? a.rng_state->clone() : make_rng_state(a.sample, a.query);
}

inline bool has_sink(const ScoreOptions& options) { return is_defined(options.sinks); }

}  // namespace torch_attn::ops
