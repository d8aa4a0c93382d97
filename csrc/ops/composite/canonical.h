// What users may pass (any leading dimensions, broadcasting, heads that match or form groups), brought to the four
// dimensions (batch, head, row, column) of the operators that kernels implement, and results brought back. Included by
// the files that implement the operators users call. ATen operators only, so every transform applies.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include "ops/arguments.h"

namespace torch_attn::ops {

class Canonical {
 public:
  explicit Canonical(const AttentionArguments& arguments);

  const ForwardArguments& arguments() const { return arguments_; }

  // Of a result (B, Hq, …) to (…, Hq, …).
  Tensor restore(const Tensor& tensor) const;
  // Of a result without heads, (B, …), to (…).
  Tensor restore_without_heads(const Tensor& tensor) const;
  // A number per row, of the shape that restore gives, (…, Hq, L), to (B, Hq, L).
  Tensor collapse_per_row(const Tensor& tensor, const char* name) const;

 private:
  using SymSizes = c10::SymDimVector;

  static void check_ranks(const ForwardArguments& arguments);
  void collapse_leading_dimensions();
  SymSizes mask_sizes(const ForwardArguments& arguments) const;
  SymSizes broadcast(const SymSizes& left, const SymSizes& right) const;
  void match_heads(bool enable_gqa);

  bool is_canonical_ = false;  // the leading dimensions are as attention_forward wants them
  bool has_heads_ = true;      // false: all inputs are (length, head_dim)
  SymSizes leading_;
  ForwardArguments arguments_;
};

}  // namespace torch_attn::ops
