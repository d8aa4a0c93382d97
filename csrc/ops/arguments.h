// The operators' arguments as structs, so that the long flat list of a schema is written once per operator and not once
// per layer. Included by everything in ops/. A struct's fields, its Types and its flat() all follow schema.cpp's order.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace torch_attn::ops {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

template <class... Types>
struct TypeList {
  template <class... More>
  static TypeList<Types..., More...> plus(TypeList<More...>);
};
template <class First, class Second>
using Concatenated = decltype(First::plus(Second{}));

// What all attention operators take after their tensors.
struct CallOptions {
  using Types =
      TypeList<const OptionalTensor&, double, bool, std::optional<double>, std::optional<SymInt>, std::optional<SymInt>,
               std::string_view, const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&>;

  OptionalTensor attn_mask;
  double dropout_p = 0.0;
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
    return std::tie(attn_mask, dropout_p, is_causal, scale, window_left, window_right, causal_alignment, alibi_slopes,
                    softcap, sinks, key_lengths);
  }
};

// The same, and where the rows of batch entries lie if not in dimensions of their own: in the tensors of
// AttentionProblem::query_starts and key_starts, or in the pages of TensorView::pages.
struct Options : CallOptions {
  using Types =
      Concatenated<CallOptions::Types, TypeList<const OptionalTensor&, const OptionalTensor&, std::optional<SymInt>,
                                                std::optional<SymInt>, const OptionalTensor&>>;

  OptionalTensor cu_seqlens_q = {}, cu_seqlens_k = {};
  std::optional<SymInt> max_seqlen_q = {}, max_seqlen_k = {};
  OptionalTensor block_table = {};

  auto flat() const {
    return std::tuple_cat(CallOptions::flat(),
                          std::tie(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table));
  }
};

// torch_attn::attention_forward
struct ForwardArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&>, Options::Types>,
                             TypeList<const OptionalTensor&>>;

  Tensor query, key, value;
  Options options;
  OptionalTensor rng_state;  // of an earlier call, to replay its dropout; none: drawn

  auto flat() const { return std::tuple_cat(std::tie(query, key, value), options.flat(), std::tie(rng_state)); }
};
using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;  // out, logsumexp, rng_state

// torch_attn::attention and torch_attn::attention_with_logsumexp
struct AttentionArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&>, CallOptions::Types>,
                             TypeList<bool>>;

  Tensor query, key, value;
  CallOptions options;
  bool enable_gqa = false;

  auto flat() const { return std::tuple_cat(std::tie(query, key, value), options.flat(), std::tie(enable_gqa)); }
  ForwardArguments forward() const { return {query, key, value, Options{options}, std::nullopt}; }
};

// The inputs that have a gradient, in the order of attention_backward's output_mask and results.
enum Gradient : size_t { kQuery, kKey, kValue, kAttnMask, kAlibiSlopes, kSinks, kGradients };
using OutputMask = std::array<bool, kGradients>;

// torch_attn::attention_backward
struct BackwardArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&>,
                                          Options::Types>,
                             TypeList<OutputMask>>;

  Tensor grad_out;
  OptionalTensor grad_logsumexp;
  Tensor query, key, value, out, logsumexp, rng_state;
  Options options;
  OutputMask output_mask{};

  auto flat() const {
    return std::tuple_cat(std::tie(grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state),
                          options.flat(), std::tie(output_mask));
  }
  ForwardArguments forward() const { return {query, key, value, options, rng_state}; }
};
// One tensor per Gradient; an unwanted one has shape (0).
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Tangents of the inputs that have a gradient, for forward-mode differentiation; none: zero.
struct Tangents {
  using Types = TypeList<const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&>;

  OptionalTensor query, key, value, attn_mask, alibi_slopes, sinks;

  auto flat() const { return std::tie(query, key, value, attn_mask, alibi_slopes, sinks); }
};

// torch_attn::attention_jvp
struct JvpArguments {
  using Types =
      Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&, const Tensor&>, Tangents::Types>,
                   Options::Types>;

  Tensor query, key, value, rng_state;
  Tangents tangents;
  Options options;

  auto flat() const { return std::tuple_cat(std::tie(query, key, value, rng_state), tangents.flat(), options.flat()); }
  ForwardArguments forward() const { return {query, key, value, options, rng_state}; }
};
using JvpResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, logsumexp, tangent_out, tangent_logsumexp

// torch_attn::attention_backward_jvp: the tangents of attention_backward's results
struct BackwardJvpArguments {
  using Types = Concatenated<
      Concatenated<Concatenated<TypeList<const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const OptionalTensor&, const OptionalTensor&>,
                                Tangents::Types>,
                   Options::Types>,
      TypeList<OutputMask>>;

  Tensor grad_out;
  OptionalTensor grad_logsumexp;
  Tensor query, key, value, out, logsumexp, rng_state, tangent_out, tangent_logsumexp;
  OptionalTensor tangent_grad_out, tangent_grad_logsumexp;
  Tangents tangents;
  Options options;
  OutputMask output_mask{};

  auto flat() const {
    return std::tuple_cat(std::tie(grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, tangent_out,
                                   tangent_logsumexp, tangent_grad_out, tangent_grad_logsumexp),
                          tangents.flat(), options.flat(), std::tie(output_mask));
  }
  BackwardArguments backward() const {
    return {grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options, output_mask};
  }
};

// torch_attn::dropout_keep_mask
struct DropoutArguments {
  using Types = TypeList<const Tensor&, SymInt, SymInt, SymInt, SymInt, double>;

  Tensor rng_state;
  SymInt batch, heads, query_length, key_length;
  double dropout_p = 0.0;

  auto flat() const { return std::tie(rng_state, batch, heads, query_length, key_length, dropout_p); }
};

// Which rows of a longer query the rows of a call are: see AttentionProblem::query_rows.
struct SelectedRows {
  OptionalTensor rows;                 // (L'), int64, each in [0, query_length), in any order
  std::optional<SymInt> query_length;  // given with rows
};

// torch_attn::cuda_tiers
struct CudaTiersArguments {
  using Types = Concatenated<Concatenated<TypeList<const Tensor&, const Tensor&, const Tensor&>, CallOptions::Types>,
                             TypeList<bool, int64_t, int64_t, std::string_view>>;

  Tensor query, key, value;
  CallOptions options;
  bool backward = false;
  int64_t compute_capability = 0, multiprocessors = 0;  // 0: ask query's device
  std::string_view operation = "attention";             // or attention_weights, attention_statistics, hard_attention
};

constexpr int64_t kRngStateSize = 3;  // see outputs.h

inline bool is_defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline bool is_paged(const Options& o) { return is_defined(o.block_table); }
inline bool is_packed(const Options& o) { return is_defined(o.cu_seqlens_q) || is_defined(o.cu_seqlens_k); }

// The sizes by name; of tensors that check_arguments has passed. Those of packed sequences count all of their rows.
struct Sizes {
  SymInt batch, heads, kv_heads, query_length, key_length, head_dim, value_dim;
  SymInt entries;  // what is given per batch entry has so many: batch, or the number of packed sequences

  static Sizes of(const ForwardArguments& a) {
    const Options& o = a.options;
    const auto sequences = [](const Tensor& starts) { return starts.sym_size(0) - 1; };
    return {a.query.sym_size(0),
            a.query.sym_size(1),
            a.key.sym_size(1),
            a.query.sym_size(2),
            is_paged(o) ? o.block_table->sym_size(1) * a.key.sym_size(2) : a.key.sym_size(2),
            a.query.sym_size(3),
            a.value.sym_size(3),
            is_defined(o.cu_seqlens_q) ? sequences(*o.cu_seqlens_q) : a.query.sym_size(0)};
  }
};

inline at::ScalarType accumulator_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace torch_attn::ops
