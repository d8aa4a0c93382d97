// What the autograd::Functions of the operators share: how a call's options are kept for backward, which of its tensors
// are differentiable, and how a Function runs under torch.func. Included by the files beside it.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/check.h"
#include "ops/operators.h"

namespace torch_attn::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline OptionalTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
inline Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// The inputs that may have a gradient, in the order of enum Gradient; undefined where the call has none.
using Inputs = std::array<Tensor, kGradients>;

template <class Arguments>
Inputs inputs_of(const Arguments& a) {
  const Options& o = a.options;
  return {a.query, a.key, a.value, or_undefined(o.attn_mask), or_undefined(o.alibi_slopes), or_undefined(o.sinks)};
}
inline Inputs inputs_of(const Tangents& t) {
  return {or_undefined(t.query),     or_undefined(t.key),          or_undefined(t.value),
          or_undefined(t.attn_mask), or_undefined(t.alibi_slopes), or_undefined(t.sinks)};
}
// Of any range of tensors at least as long.
template <class Range>
Tangents as_tangents(const Range& t) {
  return {or_none(t[kQuery]),    or_none(t[kKey]),         or_none(t[kValue]),
          or_none(t[kAttnMask]), or_none(t[kAlibiSlopes]), or_none(t[kSinks])};
}
template <class... Types>
std::array<Tensor, sizeof...(Types)> as_array(const std::tuple<Types...>& tensors) {
  return std::apply([](auto&&... t) { return std::array<Tensor, sizeof...(Types)>{t...}; }, tensors);
}

inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
inline bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }

// The defined ones: what a Function may take as a list.
template <class... Ranges>
variable_list present(const Ranges&... ranges) {
  variable_list list;
  const auto add = [&list](const auto& range) {
    for (const Tensor& tensor : range)
      if (tensor.defined()) list.push_back(tensor);
  };
  (add(ranges), ...);
  return list;
}

// Walks the tensors that were given to a Function as such a list, and their gradients.
class Edges {
 public:
  explicit Edges(AutogradContext& context) : context_(context) {}

  // Whether the gradient of the next one is wanted. One that was undefined has no edge.
  bool next_is_wanted(const Tensor& saved) {
    if (!saved.defined()) return false;
    return context_.needs_input_grad(count_++);
  }
  size_t count() const { return count_; }

 private:
  AutogradContext& context_;
  size_t count_ = 0;
};

// PyTorch refuses a C++ Function under torch.func's transforms, since most compute in forward without regard to the
// transform's level. Ours only redispatches below autograd, as PyTorch's own kernels do, which is right on every level.
// So the transforms' state is put aside while Function::apply asks for it, and is back when forward dispatches.
class TransformState {
 public:
  TransformState() : state_(std::move(at::functorch::functorchTLSAccessor())) {}
  ~TransformState() { restore(); }
  TransformState(const TransformState&) = delete;
  TransformState& operator=(const TransformState&) = delete;

  void restore() {
    if (state_) at::functorch::functorchTLSAccessor() = std::move(state_);
  }

 private:
  std::unique_ptr<at::functorch::FuncTorchTLSBase> state_;
};

// First thing in a Function's forward.
class BelowAutograd {
 public:
  explicit BelowAutograd(TransformState& transforms) { transforms.restore(); }

 private:
  const at::AutoGradMode enabled_{true};  // Function::apply turned it off, for the transforms' outer levels as well
  const at::AutoDispatchBelowADInplaceOrView guard_;
};

// Differentiable tensors as a list, the call's arguments, the transforms: what each Function's apply takes.
template <class Function, class Arguments>
variable_list apply(const variable_list& differentiable, const Arguments& arguments) {
  TransformState transforms;
  return Function::apply(at::TensorList(differentiable), &arguments, &transforms);
}
constexpr size_t kOtherArguments = 2;  // of those, the last two have no gradient

// The options that are no tensors, in a Function's saved_data: only what differs from the default, for most calls
// nothing.
void save_options(AutogradContext& context, const CallOptions& options);
void save_options(AutogradContext& context, const Options& options);
// The tensor options that have a gradient, in saved, follow enum Gradient; key_lengths is apart.
CallOptions saved_options(const AutogradContext& context, const variable_list& saved, const Tensor& key_lengths);

// The tensor options without a gradient, which the Functions of attention's operators save last.
inline void append_indices(variable_list& saved, const Options& o) {
  saved.insert(saved.end(), {or_undefined(o.key_lengths), or_undefined(o.cu_seqlens_q), or_undefined(o.cu_seqlens_k)});
}
Options saved_options(const AutogradContext& context, const variable_list& saved,
                      variable_list::const_iterator indices);

}  // namespace torch_attn::ops
