// The operator cuda_tiers: which tier of CUDA kernels would serve a call, and why others would not. Tensors may lie on
// any device; torch_attn.info.explain asks it about GPUs that are not there. Without CUDA kernels there are no tiers.
#include "ops/operators.h"

#if defined(TORCH_ATTN_WITH_CUDA)
#include <ATen/Context.h>

#include "core/dropout.h"
#include "cuda/map_kernels.h"
#include "cuda/selection_kernels.h"
#include "ops/cuda/precision.h"
#include "ops/make_problem.h"
#endif

namespace torch_attn::ops {
namespace {

#if defined(TORCH_ATTN_WITH_CUDA)

// A gradient as run_backward allocates it, of which only layout and alignment are looked at.
TensorView layout_of_gradient(int64_t heads, int64_t length, int64_t dim) {
  constexpr uintptr_t kAligned = 512;
  TensorView view;
  view.data = reinterpret_cast<void*>(kAligned);
  view.stride[0] = length * heads * dim;
  view.stride[1] = dim;
  view.stride[2] = heads * dim;
  view.stride[3] = 1;
  return view;
}

std::vector<cuda::TierAnswer> answers(const CudaTiersArguments& a, const AttentionProblem& p, const BackwardTensors& t,
                                      const cuda::DeviceFacts& device) {
  if (a.operation == "attention")
    return a.backward ? cuda::backward_tiers(p, t, device) : cuda::forward_tiers(p, device);
  if (a.operation == "attention_weights" || a.operation == "attention_statistics")
    return a.backward ? cuda::map_backward_tiers(p, t, device) : cuda::map_forward_tiers(p, device);
  TORCH_CHECK_VALUE(a.operation == "hard_attention",
                    "cuda_tiers: operation must be attention, attention_weights, attention_statistics or "
                    "hard_attention, but it is ",
                    a.operation, ".");
  return a.backward ? cuda::select_keys_backward_tiers() : cuda::select_keys_tiers(p, device);
}

std::vector<std::string> cuda_tiers(const CudaTiersArguments& a) {
  ForwardArguments call{a.query, a.key, a.value, Options{a.options}, std::nullopt};
  call.options.dropout_p = 0;  // no state of dropout is drawn
  const PreparedProblem prepared = make_problem(call, Tensor());
  AttentionProblem p = with_precision_of_matmul(prepared.problem);
  p.dropout_p = Dropout::rounded(a.options.dropout_p);

  cuda::DeviceFacts device;
  if (a.compute_capability == 0 && a.query.is_cuda()) device = cuda::device_facts(a.query.device().index());
  if (a.compute_capability != 0) device.compute_capability = static_cast<int>(a.compute_capability);
  if (a.multiprocessors != 0) device.multiprocessors = static_cast<int>(a.multiprocessors);

  BackwardTensors t;
  float slopes = 0;
  if (a.backward) {
    t.grad_out = layout_of_gradient(p.heads, p.query_length, p.value_dim);
    t.grad_query = layout_of_gradient(p.heads, p.query_length, p.head_dim);
    t.grad_key = layout_of_gradient(p.kv_heads, p.key_length, p.head_dim);
    t.grad_value = layout_of_gradient(p.kv_heads, p.key_length, p.value_dim);
    if (is_defined(a.options.alibi_slopes) && a.options.alibi_slopes->requires_grad()) t.grad_alibi_slopes = &slopes;
    t.deterministic = at::globalContext().deterministicAlgorithms();
  }
  std::vector<std::string> result;
  for (const auto& answer : answers(a, p, t, device)) {
    result.emplace_back(answer.tier);
    result.push_back(answer.refusal.empty() ? answer.form : "");
    result.push_back(answer.refusal);
  }
  return result;
}

#else

std::vector<std::string> cuda_tiers(const CudaTiersArguments&) { return {}; }

#endif

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) { m.impl("cuda_tiers", CudaTiers::kernel<cuda_tiers>); }

}  // namespace torch_attn::ops
