// The operators for packed sequences and paged key/value caches, as users call them; see operators.h. Included by
// composite/varlen.cpp.
#pragma once

#include "ops/operators.h"

namespace torch_attn::ops {

// torch_attn::varlen_attention and varlen_attention_with_logsumexp; CallOptions without attn_mask.
struct VarlenArguments {
  using Types = TypeList<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, SymInt,
                         SymInt, double, bool, std::optional<double>, std::optional<SymInt>, std::optional<SymInt>,
                         std::string_view, const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, bool>;

  Tensor query, key, value, cu_seqlens_q;
  OptionalTensor cu_seqlens_k;
  SymInt max_seqlen_q, max_seqlen_k;
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale;
  std::optional<SymInt> window_left, window_right;
  std::string_view causal_alignment;
  OptionalTensor alibi_slopes;
  double softcap = 0.0;
  OptionalTensor sinks, key_lengths, block_table;
  bool enable_gqa = false;

  Options options() const {
    return {{std::nullopt, dropout_p, is_causal, scale, window_left, window_right, causal_alignment, alibi_slopes,
             softcap, sinks, key_lengths},
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            is_defined(cu_seqlens_k) ? std::optional(max_seqlen_k) : std::nullopt,
            block_table};
  }
};

// torch_attn::paged_attention and paged_attention_with_logsumexp
struct PagedArguments {
  using Types = TypeList<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool,
                         std::optional<double>, std::optional<SymInt>, std::optional<SymInt>, std::string_view,
                         const OptionalTensor&, double, const OptionalTensor&, bool>;

  Tensor query, key_cache, value_cache, block_table, key_lengths;
  bool is_causal = false;
  std::optional<double> scale;
  std::optional<SymInt> window_left, window_right;
  std::string_view causal_alignment;
  OptionalTensor alibi_slopes;
  double softcap = 0.0;
  OptionalTensor sinks;
  bool enable_gqa = false;

  Options options() const {
    Options o{{std::nullopt, 0.0, is_causal, scale, window_left, window_right, causal_alignment, alibi_slopes, softcap,
               sinks, key_lengths}};
    o.block_table = block_table;
    return o;
  }
};

struct VarlenAttention : Operator<VarlenAttention, VarlenArguments, Tensor> {};
struct VarlenAttentionWithLogsumexp
    : Operator<VarlenAttentionWithLogsumexp, VarlenArguments, std::tuple<Tensor, Tensor>> {};
struct PagedAttention : Operator<PagedAttention, PagedArguments, Tensor> {};
struct PagedAttentionWithLogsumexp : Operator<PagedAttentionWithLogsumexp, PagedArguments, std::tuple<Tensor, Tensor>> {
};

}  // namespace torch_attn::ops
