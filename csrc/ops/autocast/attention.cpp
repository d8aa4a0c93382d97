// Autocast: query, key and value run in the autocast dtype. The mask, slopes and sinks keep theirs (kernels read any
// floating dtype), and logsumexp stays float32.
#include <ATen/autocast_mode.h>

#include "ops/selection.h"
#include "ops/self_attention.h"

namespace torch_attn::ops {
namespace {

template <c10::DeviceType device, c10::DispatchKey key>
ForwardResult attention_forward_autocast(const ForwardArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(type, tensor, device); };
  return AttentionForward::call({cast(a.query), cast(a.key), cast(a.value), a.options, a.rng_state});
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor self_attention_autocast(const SelfAttentionArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return SelfAttention::call(
      {at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), a.qkv, device), a.options});
}

template <c10::DeviceType device, c10::DispatchKey key>
SelectResult select_keys_autocast(const SelectArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  SelectArguments cast = a;
  cast.query = at::autocast::cached_cast(type, a.query, device);
  cast.key = at::autocast::cached_cast(type, a.key, device);
  return SelectKeys::call(cast);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor gather_values_autocast(const GatherArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const OptionalTensor weights = is_defined(a.weights) ? OptionalTensor(a.weights->to(at::kFloat)) : std::nullopt;
  return GatherValues::call({at::autocast::cached_cast(type, a.value, device), a.indices, weights});
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, AutocastCPU, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
  m.impl("select_keys", SelectKeys::kernel<select_keys_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
  m.impl("attention_forward",
         AttentionForward::kernel<attention_forward_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
  m.impl("self_attention", SelfAttention::kernel<self_attention_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
}
TORCH_LIBRARY_IMPL(torch_attn, AutocastCUDA, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
  m.impl("select_keys", SelectKeys::kernel<select_keys_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
  m.impl("attention_forward",
         AttentionForward::kernel<attention_forward_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
  m.impl("self_attention", SelfAttention::kernel<self_attention_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
}

}  // namespace torch_attn::ops
