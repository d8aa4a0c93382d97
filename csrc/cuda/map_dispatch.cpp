// The functions of map_kernels.h: the choice of the element type, and the order of the backward pass's kernels. Plain
// C++: no CUDA header.
#include <stdexcept>

#include "device_info.h"
#include "map_kernels.h"
#include "shared_kernels.h"
#include "simt/map_variants.h"

namespace torch_attn::cuda {
namespace {

template <class Function>
void with_type(ScalarType dtype, Function&& function) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return function(double{});
    case ScalarType::kFloat32:
      return function(float{});
    case ScalarType::kBFloat16:
      return function(BFloat16{});
    case ScalarType::kFloat16:
      return function(Float16{});
    case ScalarType::kBool:
      break;
  }
  throw std::invalid_argument("attention maps on CUDA take float64, float32, bfloat16 and float16");
}

size_t bytes_per_row(const AttentionProblem& p, size_t numbers) {
  const size_t rows = static_cast<size_t>(p.batch * p.heads * p.query_length);
  return numbers * rows * (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}

}  // namespace

size_t map_forward_workspace_bytes(const AttentionProblem& p) { return bytes_per_row(p, 1); }
size_t map_backward_workspace_bytes(const AttentionProblem& p) { return bytes_per_row(p, 3); }  // RowStatistics

void attention_statistics(const AttentionProblem& p, const StatisticsOutputs& outputs, void* workspace,
                          const Stream& stream) {
  set_device(stream.device);
  with_type(p.dtype, [&](auto element) { simt::map_statistics<decltype(element)>(p, outputs, workspace, stream); });
}

void attention_weights(const AttentionProblem& p, const WeightsOutputs& outputs, void* workspace,
                       const Stream& stream) {
  set_device(stream.device);
  with_type(p.dtype, [&](auto element) { simt::map_weights<decltype(element)>(p, outputs, workspace, stream); });
}

void attention_map_backward(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace,
                            const Stream& stream) {
  set_device(stream.device);
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    simt::map_row_terms<T>(p, t, workspace, stream);
    if (t.grad_query.defined() || t.grad_alibi_slopes) simt::map_query_gradient<T>(p, t, workspace, stream);
    if (t.grad_alibi_slopes) slope_gradient<T>(p, t, workspace, stream);
    if (t.grad_key.defined()) simt::map_key_gradient<T>(p, t, workspace, stream);
    if (t.grad_attn_mask.defined()) simt::map_mask_gradient<T>(p, t, workspace, stream);
  });
}

}  // namespace torch_attn::cuda
