// The CUDA kernels of attention maps as operators. Empty in a build without nvcc.
#if defined(TORCH_ATTN_WITH_CUDA)

#include <c10/core/DeviceGuard.h>

#include "cuda/map_kernels.h"
#include "ops/cuda/precision.h"
#include "ops/cuda/stream.h"
#include "ops/map_call.h"

namespace torch_attn::ops {
namespace {

void run_statistics_kernel(const AttentionProblem& problem, const StatisticsOutputs& outputs, const Tensor& query) {
  const AttentionProblem p = with_precision_of_matmul(problem);
  const Tensor workspace = workspace_of(cuda::map_forward_workspace_bytes(p), query);
  cuda::attention_statistics(p, outputs, workspace.mutable_data_ptr(), current_stream(query));
}

void run_backward_kernel(const AttentionProblem& problem, const MapBackwardTensors& tensors, const Tensor& query) {
  const AttentionProblem p = with_precision_of_matmul(problem);
  const Tensor workspace = workspace_of(cuda::map_backward_workspace_bytes(p), query);
  cuda::attention_map_backward(p, tensors, workspace.mutable_data_ptr(), current_stream(query));
}

StatisticsResult attention_statistics_forward_cuda(const StatisticsArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_statistics(a, [&](const AttentionProblem& p, const StatisticsOutputs& outputs) {
    run_statistics_kernel(p, outputs, a.query);
  });
}

WeightsResult attention_weights_forward_cuda(const WeightsArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  const auto find_logsumexp = [&](const AttentionProblem& p, void* logsumexp) {
    StatisticsOutputs only;
    only.logsumexp = logsumexp;
    run_statistics_kernel(p, only, a.query);
  };
  return run_weights(a, find_logsumexp, [&](const AttentionProblem& problem, const WeightsOutputs& outputs) {
    const AttentionProblem p = with_precision_of_matmul(problem);
    const Tensor workspace = workspace_of(cuda::map_forward_workspace_bytes(p), a.query);
    cuda::attention_weights(p, outputs, workspace.mutable_data_ptr(), current_stream(a.query));
  });
}

MapBackwardResult attention_statistics_backward_cuda(const StatisticsBackwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_statistics_backward(a, [&](const AttentionProblem& p, const MapBackwardTensors& tensors) {
    run_backward_kernel(p, tensors, a.query);
  });
}

MapBackwardResult attention_weights_backward_cuda(const WeightsBackwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_weights_backward(a, [&](const AttentionProblem& p, const MapBackwardTensors& tensors) {
    run_backward_kernel(p, tensors, a.query);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CUDA, m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<attention_statistics_forward_cuda>);
  m.impl("attention_statistics_backward", AttentionStatisticsBackward::kernel<attention_statistics_backward_cuda>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<attention_weights_forward_cuda>);
  m.impl("attention_weights_backward", AttentionWeightsBackward::kernel<attention_weights_backward_cuda>);
}

}  // namespace torch_attn::ops

#endif  // TORCH_ATTN_WITH_CUDA
