// The CPU kernels as operators: allocates the outputs, runs csrc/cpu on PyTorch's thread pool.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <atomic>

#include "cpu/kernels.h"
#include "ops/check.h"
#include "ops/make_problem.h"
#include "ops/operators.h"
#include "ops/outputs.h"

namespace torch_attn::ops {
namespace {

// The op kernel_calls, by which a test proves that a result came from these kernels.
std::atomic<int64_t> forward_calls{0};

int64_t kernel_calls() { return forward_calls.load(std::memory_order_relaxed); }

cpu::Parallel torch_threads() {
  const auto run = [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(context, i);
    });
  };
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), nullptr, run};
}

ForwardResult attention_forward_cpu(const ForwardArguments& a) {
  const Tensor rng_state = make_rng_state(a.options.dropout_p, a.query);
  const PreparedProblem prepared = make_problem(a, rng_state);
  const AttentionProblem& p = prepared.problem;

  const auto options = a.query.options();
  Tensor out = empty_by_row(p.batch, p.heads, p.query_length, p.value_dim, options);
  Tensor logsumexp =
      at::empty({p.batch, p.heads, p.query_length}, options.dtype(accumulator_type(a.query.scalar_type())));
  forward_calls.fetch_add(1, std::memory_order_relaxed);
  if (logsumexp.numel() > 0) cpu::attention_forward(p, {view_of(out), logsumexp.mutable_data_ptr()}, torch_threads());
  return {out, logsumexp, rng_state};
}

// -Σ P_sink · (rowsum(grad_out · out) - grad_logsumexp), where P_sink = exp(sink - logsumexp) is the sink's share.
Tensor grad_sinks_cpu(const BackwardArguments& a) {
  const Tensor& sinks = *a.options.sinks;
  const auto accumulator = a.logsumexp.scalar_type();
  Tensor row_term = (a.grad_out.to(accumulator) * a.out.to(accumulator)).sum(-1);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - *a.grad_logsumexp;
  const Tensor share = (sinks.to(accumulator).unsqueeze(-1) - a.logsumexp).exp();
  const Tensor is_empty = a.logsumexp == -std::numeric_limits<double>::infinity();
  return (share * row_term).masked_fill(is_empty, 0).sum({0, 2}).neg().to(sinks.scalar_type());
}

BackwardResult attention_backward_cpu(const BackwardArguments& a) {
  check_arguments(a);
  const PreparedProblem prepared = make_problem(a.forward(), a.rng_state);
  const AttentionProblem& p = prepared.problem;
  const auto accumulator = a.query.options().dtype(a.logsumexp.scalar_type());

  // What the kernel reads.
  const Tensor out = with_unit_column_stride(a.out), grad_out = with_unit_column_stride(a.grad_out);
  const Tensor logsumexp = a.logsumexp.contiguous();
  const Tensor grad_logsumexp = is_defined(a.grad_logsumexp) ? a.grad_logsumexp->contiguous() : Tensor();
  BackwardTensors t;
  t.out = view_of(out);
  t.grad_out = view_of(grad_out);
  t.out.stride[3] = t.grad_out.stride[3] = 1;
  t.logsumexp = logsumexp.const_data_ptr();
  t.grad_logsumexp = grad_logsumexp.defined() ? grad_logsumexp.const_data_ptr() : nullptr;

  // What it writes.
  const auto allocate = [&](Gradient gradient, const Tensor& input, TensorView& view) {
    if (!a.output_mask[gradient]) return no_gradient(a.query);
    Tensor result = empty_by_row_like(input);
    view = view_of(result);
    view.stride[3] = 1;
    return result;
  };
  Tensor grad_query = allocate(kQuery, a.query, t.grad_query);
  Tensor grad_key = allocate(kKey, a.key, t.grad_key);
  Tensor grad_value = allocate(kValue, a.value, t.grad_value);
  Tensor grad_mask, grad_slopes;
  if (a.output_mask[kAttnMask]) {
    grad_mask = at::empty(a.options.attn_mask->sizes(), accumulator);
    t.grad_attn_mask = view_of(grad_mask);
  }
  if (a.output_mask[kAlibiSlopes]) {
    grad_slopes = at::empty({p.batch, p.heads}, accumulator);
    t.grad_alibi_slopes = grad_slopes.mutable_data_ptr();
  }

  cpu::attention_backward(p, t, torch_threads());

  if (grad_mask.defined()) grad_mask = grad_mask.to(a.options.attn_mask->scalar_type());
  if (grad_slopes.defined()) {
    const Tensor& slopes = *a.options.alibi_slopes;
    grad_slopes = (slopes.dim() == 2 ? grad_slopes : grad_slopes.sum(0)).to(slopes.scalar_type());
  }
  const auto or_no_gradient = [&](const Tensor& t) { return t.defined() ? t : no_gradient(a.query); };
  return {grad_query,
          grad_key,
          grad_value,
          or_no_gradient(grad_mask),
          or_no_gradient(grad_slopes),
          a.output_mask[kSinks] ? grad_sinks_cpu(a) : no_gradient(a.query)};
}

Tensor dropout_keep_mask_cpu(const DropoutArguments& a) {
  const AttentionProblem p = make_dropout_problem(a);
  Tensor mask = at::empty({p.batch, p.heads, p.query_length, p.key_length}, a.rng_state.options().dtype(at::kBool));
  cpu::dropout_keep_mask(p, mask.mutable_data_ptr<bool>(), torch_threads());
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("attention_forward", AttentionForward::kernel<attention_forward_cpu>);
  m.impl("attention_backward", AttentionBackward::kernel<attention_backward_cpu>);
  m.impl("dropout_keep_mask", DropoutKeepMask::kernel<dropout_keep_mask_cpu>);
}

TORCH_LIBRARY_IMPL(torch_attn, CompositeExplicitAutograd, m) { m.impl("kernel_calls", kernel_calls); }

}  // namespace torch_attn::ops
