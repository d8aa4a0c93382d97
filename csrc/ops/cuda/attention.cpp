// The CUDA kernels as operators. What PyTorch's user may have asked of matrix products, TF32 and determinism, is asked
// of these, too. Needs no CUDA header and no CUDA build of PyTorch; see stream.h. Empty in a build without nvcc.
#if defined(TORCH_ATTN_WITH_CUDA)

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/kernels.h"
#include "ops/cuda/precision.h"
#include "ops/cuda/stream.h"
#include "ops/kernel_call.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

// new_rng_state(a). at::zeros goes twice through the dispatcher and launches a kernel; a short call waits for the host.
Tensor new_rng_state_cuda(const ForwardArguments& a) {
  if (is_defined(a.rng_state) || a.options.dropout_p != 0) return new_rng_state(a);
  Tensor state = new_tensor({kRngStateSize}, at::kLong, a.query);
  cuda::set_zero(state.mutable_data_ptr(), state.nbytes(), current_stream(state));
  return state;
}

ForwardResult attention_forward_cuda(const ForwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_forward(a, new_rng_state_cuda(a), [&](const AttentionProblem& problem, const ForwardOutputs& outputs) {
    const AttentionProblem p = with_precision_of_matmul(problem);
    const cuda::Stream stream = current_stream(a.query);
    Tensor workspace;  // of no bytes, none is made
    if (const size_t bytes = cuda::forward_workspace_bytes(p, stream)) workspace = workspace_of(bytes, a.query);
    cuda::attention_forward(p, outputs, workspace.defined() ? workspace.mutable_data_ptr() : nullptr, stream);
  });
}

auto backward_kernel(const Tensor& query) {
  return [query](const AttentionProblem& problem, BackwardTensors tensors) {
    tensors.deterministic = at::globalContext().deterministicAlgorithms();
    const AttentionProblem p = with_precision_of_matmul(problem);
    const cuda::Stream stream = current_stream(query);
    const Tensor workspace = workspace_of(cuda::backward_workspace_bytes(p, tensors, stream), query);
    cuda::attention_backward(p, tensors, workspace.mutable_data_ptr(), stream);
  };
}

BackwardResult attention_backward_cuda(const BackwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_backward(a, backward_kernel(a.query));
}

Tensor self_attention_backward_cuda(const SelfAttentionBackwardArguments& a) {
  const c10::DeviceGuard guard(a.qkv.device());
  return run_self_attention_backward(a, backward_kernel(a.qkv));
}

Tensor dropout_keep_mask_cuda(const DropoutArguments& a) {
  const c10::DeviceGuard guard(a.rng_state.device());
  const AttentionProblem p = make_dropout_problem(a);
  Tensor mask = at::empty({p.batch, p.heads, p.query_length, p.key_length}, a.rng_state.options().dtype(at::kBool));
  if (p.dropout_p == 0) return mask.fill_(true);
  cuda::dropout_keep_mask(p, mask.mutable_data_ptr<bool>(), current_stream(mask));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CUDA, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_cuda>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_cuda>);
  m.impl("self_attention_backward", SelfAttentionBackward::kernel<self_attention_backward_cuda>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask_cuda>);
}

}  // namespace torch_attn::ops

#endif  // TORCH_ATTN_WITH_CUDA
