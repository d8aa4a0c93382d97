// The CPU kernels as operators: allocates the outputs, runs csrc/cpu on PyTorch's thread pool.
#include "ops/cpu/forward_calls.h"
#include "ops/cpu/threads.h"
#include "ops/kernel_call.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

int64_t kernel_calls() { return forward_calls.load(std::memory_order_relaxed); }

ForwardResult attention_forward_cpu(const ForwardArguments& a) {
  return run_forward(a, new_rng_state(a), [](const AttentionProblem& p, const ForwardOutputs& outputs) {
    count_forward_call();
    cpu::attention_forward(p, outputs, torch_threads());
  });
}

void run_backward_kernel(const AttentionProblem& p, const BackwardTensors& tensors) {
  cpu::attention_backward(p, tensors, torch_threads());
}

BackwardResult attention_backward_cpu(const BackwardArguments& a) { return run_backward(a, run_backward_kernel); }

Tensor self_attention_backward_cpu(const SelfAttentionBackwardArguments& a) {
  return run_self_attention_backward(a, run_backward_kernel);
}

Tensor dropout_keep_mask_cpu(const DropoutArguments& a) {
  const AttentionProblem p = make_dropout_problem(a);
  Tensor mask = at::empty({p.batch, p.heads, p.query_length, p.key_length}, a.rng_state.options().dtype(at::kBool));
  if (p.dropout_p == 0) return mask.fill_(true);
  cpu::dropout_keep_mask(p, mask.mutable_data_ptr<bool>(), torch_threads());
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_cpu>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_cpu>);
  m.impl("self_attention_backward", SelfAttentionBackward::kernel<self_attention_backward_cpu>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask_cpu>);
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) { m.impl("kernel_calls", kernel_calls); }

}  // namespace torch_attn::ops
