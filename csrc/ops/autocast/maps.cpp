// Autocast of the operators on attention maps: query and key run in the autocast dtype, which is then that of weights;
// statistics stay float32.
#include <ATen/autocast_mode.h>

#include "ops/map_operators.h"

namespace torch_attn::ops {
namespace {

template <class Op, c10::DeviceType device, c10::DispatchKey key, class Arguments>
auto in_autocast_dtype(const Arguments& arguments) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  Arguments a = arguments;
  a.query = at::autocast::cached_cast(type, a.query, device);
  a.key = at::autocast::cached_cast(type, a.key, device);
  return Op::call(a);
}

template <c10::DeviceType device, c10::DispatchKey key>
StatisticsResult statistics(const StatisticsArguments& a) {
  return in_autocast_dtype<AttentionStatisticsForward, device, key>(a);
}
template <c10::DeviceType device, c10::DispatchKey key>
WeightsResult weights(const WeightsArguments& a) {
  return in_autocast_dtype<AttentionWeightsForward, device, key>(a);
}

template <c10::DeviceType device, c10::DispatchKey key>
WithWeightsResult with_weights(const WithWeightsArguments& arguments) {
  WithWeightsArguments a = arguments;
  a.value = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), a.value, device);
  return in_autocast_dtype<AttentionWithWeightsForward, device, key>(a);
}

template <c10::DeviceType device, c10::DispatchKey key>
void register_kernels(torch::Library& m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<statistics<device, key>>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<weights<device, key>>);
  m.impl("attention_with_weights_forward", AttentionWithWeightsForward::kernel<with_weights<device, key>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, AutocastCPU, m) { register_kernels<at::kCPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(torch_attn, AutocastCUDA, m) { register_kernels<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m); }

}  // namespace torch_attn::ops
