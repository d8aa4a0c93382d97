// Brings what a user passes (any leading dimensions, broadcasting, heads shared by groups) to the four dimensions of
// the operators that kernels implement, and their results back. ATen operators only, so every transform applies.
// Included by the operators users call.
#pragma once

#include <c10/core/SymIntArrayRef.h>
#include <c10/util/DimVector.h>

#include "ops/arguments.h"

namespace torch_attn::ops {

class Canonical {
 public:
  explicit Canonical(const AttentionArguments& arguments);

  const ForwardArguments& arguments() const { return arguments_; }
  // Of out (B, Hq, L, Dv), logsumexp (B, Hq, L) or anything else of which a batch and a head are the first dimensions.
  Tensor restore(const Tensor& result) const;

 private:
  using SymSizes = c10::SymDimVector;

  void collapse_leading_dimensions();
  // (batch..., heads, query_length, key_length)
  SymSizes mask_sizes() const;
  SymSizes broadcast(const SymSizes& left, const SymSizes& right) const;
  void match_heads(bool enable_gqa);

  bool is_canonical_ = false;  // the leading dimensions are as attention_forward wants them
  bool has_heads_ = true;      // false: all inputs are (length, head_dim)
  SymSizes leading_;
  ForwardArguments arguments_;
};

}  // namespace torch_attn::ops
