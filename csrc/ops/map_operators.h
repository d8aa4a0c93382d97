// The operators on attention maps, attention_weights and attention_statistics: their arguments as structs and the
// operators as C++ types, in the manner of arguments.h and operators.h. Included by the maps.cpp of each layer.
#pragma once

#include <c10/util/ArrayRef.h>

#include "ops/score_options.h"

namespace torch_attn::ops {

// The inputs of a map that have a gradient, in the order of its backward operators' output_mask and results.
enum MapGradient : size_t { kMapQuery, kMapKey, kMapAttnMask, kMapAlibiSlopes, kMapSinks, kMapGradients };
using MapOutputMask = std::array<bool, kMapGradients>;
using MapBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // an unwanted one has shape (0)

inline OutputMask with_value(const MapOutputMask& m) { return {m[0], m[1], false, m[2], m[3], m[4]}; }
inline MapBackwardResult without_value(const BackwardResult& r) {
  return {std::get<kQuery>(r), std::get<kKey>(r), std::get<kAttnMask>(r), std::get<kAlibiSlopes>(r),
          std::get<kSinks>(r)};
}

// torch_attn::attention_statistics_forward
struct StatisticsArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&>, ScoreOptions::Types>,
                             TypeList<int64_t, std::optional<SymInt>, bool>>;

  Tensor query, key;
  ScoreOptions options;
  int64_t top_k = 0;
  std::optional<SymInt> mass_window;
  bool column_sum = true;

  auto flat() const {
    return std::tuple_cat(std::tie(query, key), options.flat(), std::tie(top_k, mass_window, column_sum));
  }
  ForwardArguments forward() const { return without_value(query, key, options); }
};

// Its results. One that was not asked for has shape (0).
enum Statistic : size_t {
  kLogsumexp,
  kEntropy,
  kMaxWeight,
  kArgmax,
  kMeanDistance,
  kWindowMass,
  kTopWeights,
  kTopIndices,
  kColumnSum,
  kStatistics
};
using StatisticsResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// torch_attn::attention_statistics
struct StatisticsCallArguments {
  using Types = Concatenated<StatisticsArguments::Types, TypeList<bool>>;

  Tensor query, key;
  ScoreOptions options;
  int64_t top_k = 0;
  std::optional<SymInt> mass_window;
  bool column_sum = true;
  bool enable_gqa = false;
};

// torch_attn::attention_statistics_backward. A statistic is read only where its gradient is given.
struct StatisticsBackwardArguments {
  using Types = Concatenated<
      Concatenated<
          TypeList<const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                   const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>,
          ScoreOptions::Types>,
      TypeList<std::optional<SymInt>, MapOutputMask>>;

  OptionalTensor grad_logsumexp, grad_entropy, grad_max_weight, grad_mean_distance, grad_window_mass, grad_top_weights,
      grad_column_sum;
  Tensor query, key, logsumexp;
  OptionalTensor entropy, max_weight, argmax, mean_distance, window_mass, top_weights, top_indices;
  ScoreOptions options;
  std::optional<SymInt> mass_window;
  MapOutputMask output_mask{};

  auto flat() const {
    return std::tuple_cat(std::tie(grad_logsumexp, grad_entropy, grad_max_weight, grad_mean_distance, grad_window_mass,
                                   grad_top_weights, grad_column_sum, query, key, logsumexp, entropy, max_weight,
                                   argmax, mean_distance, window_mass, top_weights, top_indices),
                          options.flat(), std::tie(mass_window, output_mask));
  }
  ForwardArguments forward() const { return without_value(query, key, options); }
};

// torch_attn::attention_weights_forward
struct WeightsArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&>, ScoreOptions::Types>,
                             TypeList<const OptionalTensor&, const OptionalTensor&, std::optional<SymInt>, bool>>;

  Tensor query, key;
  ScoreOptions options;
  OptionalTensor logsumexp;
  SelectedRows selected;
  bool mean = false;

  auto flat() const {
    return std::tuple_cat(std::tie(query, key), options.flat(),
                          std::tie(logsumexp, selected.rows, selected.query_length, mean));
  }
  ForwardArguments forward() const { return without_value(query, key, options); }
};
using WeightsResult = std::tuple<Tensor, Tensor>;  // weights, logsumexp

// torch_attn::attention_with_weights_forward: attention without dropout, and the weights it used
struct WithWeightsArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&>, ScoreOptions::Types>,
                             TypeList<bool>>;

  Tensor query, key, value;
  ScoreOptions options;
  bool mean = false;

  auto flat() const { return std::tuple_cat(std::tie(query, key, value), options.flat(), std::tie(mean)); }
  ForwardArguments forward() const { return {query, key, value, Options{options.options()}, std::nullopt}; }
  WeightsArguments weights(const OptionalTensor& logsumexp) const { return {query, key, options, logsumexp, {}, mean}; }
};
using WithWeightsResult = std::tuple<Tensor, Tensor, Tensor>;  // out, weights, logsumexp

// torch_attn::attention_weights and attention_weights.heads; Heads is "all" or "mean", or indices.
template <class HeadsType>
struct WeightsCallArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&>, ScoreOptions::Types>,
                             TypeList<const OptionalTensor&, HeadsType, const OptionalTensor&, bool>>;

  Tensor query, key;
  ScoreOptions options;
  OptionalTensor logsumexp;
  HeadsType heads;
  OptionalTensor queries;
  bool enable_gqa = false;
};

// torch_attn::attention_weights_backward
struct WeightsBackwardArguments {
  using Types = Concatenated<
      Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&, const Tensor&>, ScoreOptions::Types>,
      TypeList<const OptionalTensor&, std::optional<SymInt>, bool, MapOutputMask>>;

  Tensor grad_weights, query, key, logsumexp;
  ScoreOptions options;
  SelectedRows selected;
  bool mean = false;
  MapOutputMask output_mask{};

  auto flat() const {
    return std::tuple_cat(std::tie(grad_weights, query, key, logsumexp), options.flat(),
                          std::tie(selected.rows, selected.query_length, mean, output_mask));
  }
  WeightsArguments forward() const { return {query, key, options, logsumexp, selected, mean}; }
};

// The checks: see check.h.
void check_arguments(const StatisticsArguments& arguments);
void check_arguments(const StatisticsBackwardArguments& arguments);
void check_arguments(const WeightsArguments& arguments);
void check_arguments(const WeightsBackwardArguments& arguments);

struct AttentionStatisticsForward : Operator<AttentionStatisticsForward, StatisticsArguments, StatisticsResult> {
  static constexpr const char* name = "torch_attn::attention_statistics_forward";
};
struct AttentionStatisticsBackward
    : Operator<AttentionStatisticsBackward, StatisticsBackwardArguments, MapBackwardResult> {
  static constexpr const char* name = "torch_attn::attention_statistics_backward";
};
struct AttentionWeightsForward : Operator<AttentionWeightsForward, WeightsArguments, WeightsResult> {
  static constexpr const char* name = "torch_attn::attention_weights_forward";
};
struct AttentionWeightsBackward : Operator<AttentionWeightsBackward, WeightsBackwardArguments, MapBackwardResult> {
  static constexpr const char* name = "torch_attn::attention_weights_backward";
};
struct AttentionWithWeightsForward : Operator<AttentionWithWeightsForward, WithWeightsArguments, WithWeightsResult> {
  static constexpr const char* name = "torch_attn::attention_with_weights_forward";
};
struct AttentionStatistics : Operator<AttentionStatistics, StatisticsCallArguments, StatisticsResult> {};
template <class HeadsType>
struct AttentionWeights : Operator<AttentionWeights<HeadsType>, WeightsCallArguments<HeadsType>, Tensor> {};

}  // namespace torch_attn::ops
