// Differentiation. The fused path is an autograd::Function whose backward is an operator of its own; where that cannot
// serve (torch.func's transforms, forward mode, a differentiated backward), the composite formula is differentiated.
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/check.h"
#include "ops/composite/formula.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The options that are no tensors, in a Function's saved_data: only what differs from the default, for most calls
// nothing.
void save_options(AutogradContext& context, const Options& o) {
  auto& data = context.saved_data;
  if (o.dropout_p != 0) data["dropout_p"] = o.dropout_p;
  if (o.is_causal) data["is_causal"] = true;
  if (o.scale.has_value()) data["scale"] = *o.scale;
  if (o.window_left.has_value()) data["window_left"] = *o.window_left;
  if (o.window_right.has_value()) data["window_right"] = *o.window_right;
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight) data["bottom_right"] = true;
  if (o.softcap != 0) data["softcap"] = o.softcap;
}

Options saved_options(const AutogradContext& context) {
  const auto& data = context.saved_data;
  Options o;
  const auto load = [&data](const char* name, auto&& set) {
    const auto entry = data.find(name);
    if (entry != data.end()) set(entry->second);
  };
  load("dropout_p", [&](const c10::IValue& v) { o.dropout_p = v.toDouble(); });
  load("is_causal", [&](const c10::IValue& v) { o.is_causal = v.toBool(); });
  load("scale", [&](const c10::IValue& v) { o.scale = v.toDouble(); });
  load("window_left", [&](const c10::IValue& v) { o.window_left = v.toSymInt(); });
  load("window_right", [&](const c10::IValue& v) { o.window_right = v.toSymInt(); });
  load("bottom_right", [&](const c10::IValue&) { o.causal_alignment = "bottom_right"; });
  load("softcap", [&](const c10::IValue& v) { o.softcap = v.toDouble(); });
  return o;
}

OptionalTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  // The first six follow enum Gradient.
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& sinks, const ForwardArguments& arguments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, logsumexp, rng_state] = AttentionForward::call(arguments);
    context->set_materialize_grads(false);
    const auto or_undefined = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
    context->save_for_backward({query, key, value, or_undefined(attn_mask), or_undefined(alibi_slopes),
                                or_undefined(sinks), or_undefined(arguments.options.key_lengths), out, logsumexp,
                                rng_state});
    save_options(*context, arguments.options);
    return {out, logsumexp, rng_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list results(kGradients + 1);
    const Tensor &grad_out = gradients[0], &grad_logsumexp = gradients[1];
    if (!grad_out.defined() && !grad_logsumexp.defined()) return results;

    const variable_list saved = context->get_saved_variables();
    const auto& out = saved[7];
    BackwardArguments arguments{grad_out.defined() ? grad_out : at::zeros_like(out),
                                or_none(grad_logsumexp),
                                saved[kQuery],
                                saved[kKey],
                                saved[kValue],
                                out,
                                saved[8],
                                saved[9],
                                saved_options(*context)};
    Options& o = arguments.options;
    o.attn_mask = or_none(saved[kAttnMask]);
    o.alibi_slopes = or_none(saved[kAlibiSlopes]);
    o.sinks = or_none(saved[kSinks]);
    o.key_lengths = or_none(saved[6]);
    for (size_t i = 0, edge = 0; i < kGradients; ++i)  // an input that is None has no edge
      arguments.output_mask[i] = saved[i].defined() && context->needs_input_grad(edge++);

    // Through the dispatcher, whose Autograd kernel below knows whether this backward is itself differentiated.
    auto computed = std::apply([](auto&&... tensors) { return std::array<Tensor, kGradients>{tensors...}; },
                               AttentionBackward::call(arguments));
    for (size_t i = 0; i < kGradients; ++i)
      if (arguments.output_mask[i]) results[i] = std::move(computed[i]);
    return results;
  }
};

template <class Predicate>
bool any_input(const ForwardArguments& a, Predicate&& holds) {
  const auto holds_for = [&](const OptionalTensor& tensor) { return is_defined(tensor) && holds(*tensor); };
  return holds(a.query) || holds(a.key) || holds(a.value) || holds_for(a.options.attn_mask) ||
         holds_for(a.options.alibi_slopes) || holds_for(a.options.sinks);
}

// A C++ Function raises under torch.func's transforms. The header that tells their state is not usable outside PyTorch;
// the dispatch key that turns them on is.
bool in_functorch() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
bool requires_grad(const Tensor& tensor) { return tensor.requires_grad(); }

ForwardResult attention_forward_autograd(const ForwardArguments& a) {
  if (in_functorch() || any_input(a, has_tangent)) return composite::attention_forward(a);
  if (at::GradMode::is_enabled() && any_input(a, requires_grad)) {
    const variable_list results = AttentionFunction::apply(a.query, a.key, a.value, a.options.attn_mask,
                                                           a.options.alibi_slopes, a.options.sinks, a);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionForward::call(a);
}

BackwardResult attention_backward_autograd(const BackwardArguments& a) {
  const ForwardArguments forward = a.forward();
  const auto holds = [&](auto&& predicate) {
    return predicate(a.grad_out) || (is_defined(a.grad_logsumexp) && predicate(*a.grad_logsumexp)) ||
           any_input(forward, predicate);
  };
  if (in_functorch() || holds(has_tangent) || (at::GradMode::is_enabled() && holds(requires_grad)))
    return composite::attention_backward(a);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return AttentionBackward::call(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Autograd, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_autograd>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_autograd>);
}

}  // namespace torch_attn::ops
