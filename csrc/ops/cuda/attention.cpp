// The CUDA kernels as operators. Needs no CUDA header and no CUDA build of PyTorch: the stream and the device come from
// c10's virtual guard. Empty in a build without nvcc.
#if defined(TORCH_ATTN_WITH_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/kernels.h"
#include "ops/kernel_call.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

// PyTorch's current stream on the tensor's device: what a captured CUDA graph records, too.
cuda::Stream current_stream(const Tensor& tensor) {
  const c10::Device device = tensor.device();
  return {device.index(), c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
}

ForwardResult attention_forward_cuda(const ForwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_forward(a, [&](const AttentionProblem& p, const ForwardOutputs& outputs) {
    cuda::attention_forward(p, outputs, current_stream(a.query));
  });
}

BackwardResult attention_backward_cuda(const BackwardArguments& a) {
  const c10::DeviceGuard guard(a.query.device());
  return run_backward(a, [&](const AttentionProblem& p, const BackwardTensors& tensors) {
    const int64_t bytes = static_cast<int64_t>(cuda::backward_workspace_bytes(p));
    const Tensor workspace = at::empty({bytes}, a.query.options().dtype(at::kByte));
    cuda::attention_backward(p, tensors, workspace.mutable_data_ptr(), current_stream(a.query));
  });
}

Tensor dropout_keep_mask_cuda(const DropoutArguments& a) {
  const c10::DeviceGuard guard(a.rng_state.device());
  const AttentionProblem p = make_dropout_problem(a);
  Tensor mask = at::empty({p.batch, p.heads, p.query_length, p.key_length}, a.rng_state.options().dtype(at::kBool));
  cuda::dropout_keep_mask(p, mask.mutable_data_ptr<bool>(), current_stream(mask));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CUDA, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_cuda>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_cuda>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask_cuda>);
}

}  // namespace torch_attn::ops

#endif  // TORCH_ATTN_WITH_CUDA
