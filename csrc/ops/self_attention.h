// torch_attn::self_attention, whose query, key and value are one tensor, as a single projection leaves them, and with
// them their gradients: what would be three gradients and a copy of each is one that the projection's backward takes as
// it is. Included by the layers' files self_attention.cpp and by the files that bring kernels.
#pragma once

#include <ATen/ops/stack.h>

#include "ops/operators.h"

namespace torch_attn::ops {

struct SelfAttentionArguments {
  using Types = Concatenated<TypeList<const Tensor&>, CallOptions::Types>;

  Tensor qkv;  // (batch, length, 3, heads, head_dim)
  CallOptions options;

  auto flat() const { return std::tuple_cat(std::tie(qkv), options.flat()); }
};

struct SelfAttentionBackwardArguments {
  using Types = Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&>,
                             CallOptions::Types>;

  Tensor grad_out, qkv, out, logsumexp, rng_state;
  CallOptions options;  // whose tensors get no gradient

  auto flat() const { return std::tuple_cat(std::tie(grad_out, qkv, out, logsumexp, rng_state), options.flat()); }
  BackwardArguments separate() const;
};

struct SelfAttention : Operator<SelfAttention, SelfAttentionArguments, Tensor> {
  static constexpr const char* name = "torch_attn::self_attention";
};
struct SelfAttentionBackward : Operator<SelfAttentionBackward, SelfAttentionBackwardArguments, Tensor> {
  static constexpr const char* name = "torch_attn::self_attention_backward";
};

// query, key or value, (batch, heads, length, head_dim): a view.
inline Tensor part_of(const Tensor& qkv, int64_t part) { return qkv.select(2, part).transpose(1, 2); }

inline void check_qkv(const Tensor& qkv) {
  TORCH_CHECK(qkv.dim() == 5 && qkv.sym_size(2) == 3,
              "self_attention: qkv must have shape (batch, length, 3, heads, head_dim), but its shape is ",
              qkv.sym_sizes(), ".");
}

inline BackwardArguments SelfAttentionBackwardArguments::separate() const {
  check_qkv(qkv);
  return {grad_out,  std::nullopt, part_of(qkv, kQuery), part_of(qkv, kKey), part_of(qkv, kValue), out,
          logsumexp, rng_state,    Options{options},     {true, true, true}};
}

namespace composite {

// The same by attention and attention_backward, which have derivatives of all kinds.
inline Tensor self_attention(const SelfAttentionArguments& a) {
  check_qkv(a.qkv);
  return Attention::call({part_of(a.qkv, kQuery), part_of(a.qkv, kKey), part_of(a.qkv, kValue), a.options});
}
inline Tensor self_attention_backward(const SelfAttentionBackwardArguments& a) {
  const auto gradients = AttentionBackward::call(a.separate());
  const auto part = [](const Tensor& gradient) { return gradient.transpose(1, 2); };
  return at::stack(
      {part(std::get<kQuery>(gradients)), part(std::get<kKey>(gradients)), part(std::get<kValue>(gradients))}, 2);
}

}  // namespace composite
}  // namespace torch_attn::ops
