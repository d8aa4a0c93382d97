// The CPU's forward-mode kernels as operators.
#include "ops/cpu/threads.h"
#include "ops/kernel_call.h"
#include "ops/operators.h"

namespace torch_attn::ops {
namespace {

// The kernels' view of the tangents, and the tensors it points into.
struct PreparedTangents {
  torch_attn::Tangents views;
  std::array<Tensor, kGradients> tensors;

  PreparedTangents(const Tangents& t, at::ScalarType accumulator) {
    views.query = matrix(kQuery, t.query);
    views.key = matrix(kKey, t.key);
    views.value = matrix(kValue, t.value);
    if (is_defined(t.attn_mask)) views.attn_mask = view_of(tensors[kAttnMask] = *t.attn_mask);
    if (is_defined(t.alibi_slopes))
      views.alibi_slopes = view_per_head(tensors[kAlibiSlopes] = t.alibi_slopes->to(accumulator));
    if (is_defined(t.sinks)) views.sinks = view_per_head(tensors[kSinks] = t.sinks->to(accumulator));
  }

 private:
  TensorView matrix(Gradient input, const OptionalTensor& tensor) {
    return is_defined(tensor) ? view_of_matrix(tensors[input] = with_unit_column_stride(*tensor)) : TensorView();
  }
};

JvpResult attention_jvp_cpu(const JvpArguments& a) {
  check_arguments(a);
  const PreparedProblem prepared = make_problem(a.forward(), a.rng_state);
  const AttentionProblem& p = prepared.problem;
  const PreparedTangents tangents(a.tangents, accumulator_type(a.query.scalar_type()));
  const auto options = a.query.options();
  const auto allocate = [&](double logsumexp_of_none) {
    const int64_t batch = a.query.size(0), rows = a.query.size(2);
    std::pair result(empty_by_row(batch, p.heads, rows, p.value_dim, options),
                     at::empty({batch, p.heads, rows}, options.dtype(accumulator_type(a.query.scalar_type()))));
    fill_rows_of_none(result.first, 2, prepared.query_starts, 0);
    fill_rows_of_none(result.second, 2, prepared.query_starts, logsumexp_of_none);
    return result;
  };
  const auto [out, logsumexp] = allocate(-std::numeric_limits<double>::infinity());
  const auto [tangent_out, tangent_logsumexp] = allocate(0);
  if (logsumexp.numel() > 0) {
    const TangentForwardOutputs outputs{view_of_matrix(out), logsumexp.mutable_data_ptr(), view_of_matrix(tangent_out),
                                        tangent_logsumexp.mutable_data_ptr()};
    cpu::attention_tangent_forward(p, tangents.views, outputs, torch_threads());
  }
  return {out, logsumexp, tangent_out, tangent_logsumexp};
}

// The tangent of kernel_call.h's grad_sinks.
Tensor tangent_grad_sinks(const BackwardJvpArguments& a) {
  const Options& o = a.options;
  const auto accumulator = a.logsumexp.scalar_type();
  const auto row_dot = [&](const Tensor& left, const Tensor& right) {
    return (left.to(accumulator) * right.to(accumulator)).sum(-1);
  };
  Tensor row_term = row_dot(a.grad_out, a.out);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - *a.grad_logsumexp;
  Tensor tangent_row_term = row_dot(a.grad_out, a.tangent_out);
  if (is_defined(a.tangent_grad_out)) tangent_row_term = tangent_row_term + row_dot(*a.tangent_grad_out, a.out);
  if (is_defined(a.tangent_grad_logsumexp)) tangent_row_term = tangent_row_term - *a.tangent_grad_logsumexp;
  Tensor tangent_score = a.tangent_logsumexp.neg();
  if (is_defined(a.tangents.sinks))
    tangent_score = tangent_score + number_of_row(a.tangents.sinks->to(accumulator), o, a.logsumexp.sym_size(2));
  const Tensor sum = sink_weights(o, a.logsumexp) * (tangent_score * row_term + tangent_row_term);
  return sum_of_rows(sum.neg(), *o.sinks, o);
}

BackwardResult attention_backward_jvp_cpu(const BackwardJvpArguments& a) {
  check_arguments(a);
  const auto accumulator = a.logsumexp.scalar_type();
  const PreparedTangents tangents(a.tangents, accumulator);
  const Tensor tangent_out = with_unit_column_stride(a.tangent_out);
  const Tensor tangent_logsumexp = a.tangent_logsumexp.contiguous();
  const Tensor tangent_grad_out =
      is_defined(a.tangent_grad_out) ? with_unit_column_stride(*a.tangent_grad_out) : Tensor();
  const Tensor tangent_grad_logsumexp =
      is_defined(a.tangent_grad_logsumexp) ? a.tangent_grad_logsumexp->contiguous() : Tensor();

  BackwardArguments backward = a.backward();
  backward.output_mask[kSinks] = false;
  auto results = run_backward(backward, [&](const AttentionProblem& p, const BackwardTensors& tensors) {
    TangentBackwardTensors t;
    static_cast<BackwardTensors&>(t) = tensors;
    t.tangent_out = view_of_matrix(tangent_out);
    t.tangent_logsumexp = tangent_logsumexp.const_data_ptr();
    if (tangent_grad_out.defined()) t.tangent_grad_out = view_of_matrix(tangent_grad_out);
    if (tangent_grad_logsumexp.defined()) t.tangent_grad_logsumexp = tangent_grad_logsumexp.const_data_ptr();
    cpu::attention_tangent_backward(p, tangents.views, t, torch_threads());
  });
  if (a.output_mask[kSinks]) std::get<kSinks>(results) = tangent_grad_sinks(a);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("attention_jvp", AttentionJvp::kernel<attention_jvp_cpu>);
  m.impl("attention_backward_jvp", AttentionBackwardJvp::kernel<attention_backward_jvp_cpu>);
}

}  // namespace torch_attn::ops
