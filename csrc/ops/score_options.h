// What shapes the scores of a call that has no dropout: the options that attention maps and hard attention share.
// Included by their operators' headers.
#pragma once

#include "ops/operators.h"

namespace torch_attn::ops {

// Options without dropout, in schema.cpp's order.
struct ScoreOptions {
  using Types =
      TypeList<const OptionalTensor&, bool, std::optional<double>, std::optional<SymInt>, std::optional<SymInt>,
               std::string_view, const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&>;

  OptionalTensor attn_mask;
  bool is_causal = false;
  std::optional<double> scale;
  std::optional<SymInt> window_left;
  std::optional<SymInt> window_right;
  std::string_view causal_alignment = "top_left";
  OptionalTensor alibi_slopes;
  double softcap = 0.0;
  OptionalTensor sinks;
  OptionalTensor key_lengths;

  auto flat() const {
    return std::tie(attn_mask, is_causal, scale, window_left, window_right, causal_alignment, alibi_slopes, softcap,
                    sinks, key_lengths);
  }
  CallOptions options() const {
    return {attn_mask,        0.0,          is_causal, scale, window_left, window_right,
            causal_alignment, alibi_slopes, softcap,   sinks, key_lengths};
  }
  static ScoreOptions of(const CallOptions& o) {
    return {o.attn_mask,        o.is_causal,    o.scale,   o.window_left, o.window_right,
            o.causal_alignment, o.alibi_slopes, o.softcap, o.sinks,       o.key_lengths};
  }
};

// Such a call needs no value; where attention's own code wants one, this has no columns.
inline Tensor without_columns(const Tensor& key) { return key.dim() == 0 ? key : key.narrow_symint(-1, 0, 0); }

inline ForwardArguments without_value(const Tensor& query, const Tensor& key, const ScoreOptions& options) {
  return {query, key, without_columns(key), Options{options.options()}, std::nullopt};
}

}  // namespace torch_attn::ops
