// What every fused implementation of the operators does around its kernels: it allocates what they write, hands them
// plain data, and finishes the small gradients with tensor operators. Included by the implementations' files.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "ops/check.h"
#include "ops/make_problem.h"
#include "ops/outputs.h"
#include "ops/packed.h"
#include "ops/self_attention.h"

namespace torch_attn::ops {

// Memory for kernels to fill, on query's device. On the CPU it is not worth a way through the dispatcher, of which a
// short call would make nine; unless it is to be filled with NaN first (torch.utils.deterministic).
inline bool is_quickly_made(const Tensor& query) {
  const at::Context& context = at::globalContext();
  return query.is_cpu() && !(context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory());
}
inline Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType type, const Tensor& query) {
  if (is_quickly_made(query)) return Tensor(at::detail::empty_cpu(sizes, type));
  return at::empty(sizes, query.options().dtype(type));
}
inline Tensor new_no_gradient(const Tensor& query) { return new_tensor({0}, query.scalar_type(), query); }

// empty_by_row, of query's dtype.
inline Tensor new_by_row(int64_t batch, int64_t heads, int64_t length, int64_t dim, const Tensor& query) {
  if (!is_quickly_made(query)) return empty_by_row(batch, heads, length, dim, query.options());
  const int64_t row = heads * dim;
  return Tensor(
      at::detail::empty_strided_cpu({batch, heads, length, dim}, {length * row, dim, row, 1}, query.scalar_type()));
}

// rng_state_of(a). Without dropout it is three zeros, which are written faster than at::zeros is dispatched.
inline Tensor new_rng_state(const ForwardArguments& a) {
  if (is_defined(a.rng_state) || a.options.dropout_p != 0 || !a.query.is_cpu()) return rng_state_of(a);
  Tensor state = new_tensor({kRngStateSize}, at::kLong, a.query);
  std::fill_n(state.mutable_data_ptr<int64_t>(), kRngStateSize, 0);
  return state;
}

// Gives the rows that belong to no packed sequence, those after the last, a value; kernels write all others. On CUDA
// where these begin is not known here, and every row gets it first.
inline void fill_rows_of_none(Tensor& t, int64_t dim, const Tensor& starts, double value) {
  if (!starts.defined()) return;
  const int64_t first = starts.is_cpu() ? starts.const_data_ptr<int64_t>()[starts.size(0) - 1] : 0;
  if (first < t.size(dim)) t.narrow(dim, first, t.size(dim) - first).fill_(value);
}

// rng_state: new_rng_state(a) or the same made otherwise. run(problem, outputs)
template <class Run>
ForwardResult run_forward(const ForwardArguments& a, const Tensor& rng_state, Run&& run) {
  const PreparedProblem prepared = make_problem(a, rng_state);
  const AttentionProblem& p = prepared.problem;
  const int64_t batch = a.query.size(0), rows = a.query.size(2);
  Tensor out = new_by_row(batch, p.heads, rows, p.value_dim, a.query);
  Tensor logsumexp = new_tensor({batch, p.heads, rows}, accumulator_type(a.query.scalar_type()), a.query);
  fill_rows_of_none(out, 2, prepared.query_starts, 0);
  fill_rows_of_none(logsumexp, 2, prepared.query_starts, -std::numeric_limits<double>::infinity());
  if (logsumexp.numel() > 0) run(p, ForwardOutputs{view_of_matrix(out), logsumexp.mutable_data_ptr()});
  return {out, logsumexp, rng_state};
}

// The sink's share of each row's softmax, (B, Hq, L); 0 in rows where everything, the sink too, is -inf.
inline Tensor sink_weights(const Options& o, const Tensor& logsumexp) {
  const Tensor is_empty = logsumexp == -std::numeric_limits<double>::infinity();
  const Tensor sink = number_of_row(o.sinks->to(logsumexp.scalar_type()), o, logsumexp.sym_size(2));
  return (sink - logsumexp).exp().masked_fill(is_empty, 0);
}

// -Σ P_sink · (rowsum(grad_out · out) - grad_logsumexp), where P_sink = exp(sink - logsumexp) is the sink's share.
inline Tensor grad_sinks(const BackwardArguments& a) {
  const auto accumulator = a.logsumexp.scalar_type();
  Tensor row_term = (a.grad_out.to(accumulator) * a.out.to(accumulator)).sum(-1);
  if (is_defined(a.grad_logsumexp)) row_term = row_term - *a.grad_logsumexp;
  return sum_of_rows(sink_weights(a.options, a.logsumexp) * row_term.neg(), *a.options.sinks, a.options);
}

// run(problem, tensors). into: where to put the gradients of query, key and value; undefined: new tensors.
template <class Run>
BackwardResult run_backward(const BackwardArguments& a, Run&& run, const std::array<Tensor, 3>& into = {}) {
  check_arguments(a);
  const PreparedProblem prepared = make_checked_problem(a.forward(), a.rng_state);
  const AttentionProblem& p = prepared.problem;
  const auto accumulator = a.logsumexp.scalar_type();

  // What the kernel reads.
  const Tensor out = with_unit_column_stride(a.out), grad_out = with_unit_column_stride(a.grad_out);
  const Tensor logsumexp = a.logsumexp.contiguous();
  const Tensor grad_logsumexp = is_defined(a.grad_logsumexp) ? a.grad_logsumexp->contiguous() : Tensor();
  BackwardTensors t;
  t.out = view_of_matrix(out);
  t.grad_out = view_of_matrix(grad_out);
  t.logsumexp = logsumexp.const_data_ptr();
  t.grad_logsumexp = grad_logsumexp.defined() ? grad_logsumexp.const_data_ptr() : nullptr;

  // What it writes.
  const auto allocate = [&](Gradient gradient, const Tensor& input, TensorView& view) {
    if (!a.output_mask[gradient]) return new_no_gradient(a.query);
    Tensor result = into[gradient].defined()
                        ? into[gradient]
                        : new_by_row(input.size(0), input.size(1), input.size(2), input.size(3), a.query);
    fill_rows_of_none(result, 2, gradient == kQuery ? prepared.query_starts : prepared.key_starts, 0);
    view = view_of_matrix(result);
    return result;
  };
  Tensor grad_query = allocate(kQuery, a.query, t.grad_query);
  Tensor grad_key = allocate(kKey, a.key, t.grad_key);
  Tensor grad_value = allocate(kValue, a.value, t.grad_value);
  Tensor grad_mask = new_no_gradient(a.query), grad_slopes = new_no_gradient(a.query);  // outputs must not alias
  if (a.output_mask[kAttnMask]) {
    grad_mask = new_tensor(a.options.attn_mask->sizes(), accumulator, a.query);
    t.grad_attn_mask = view_of(grad_mask);
  }
  if (a.output_mask[kAlibiSlopes]) {
    grad_slopes = new_tensor({p.batch, p.heads}, accumulator, a.query);
    t.grad_alibi_slopes = grad_slopes.mutable_data_ptr();
  }

  run(p, t);

  if (a.output_mask[kAttnMask]) grad_mask = grad_mask.to(a.options.attn_mask->scalar_type());
  if (a.output_mask[kAlibiSlopes]) grad_slopes = per_head_gradient(grad_slopes, *a.options.alibi_slopes);
  return {grad_query, grad_key,    grad_value,
          grad_mask,  grad_slopes, a.output_mask[kSinks] ? grad_sinks(a) : new_no_gradient(a.query)};
}

// attention_backward with gradients that are parts of one tensor, laid out like qkv.
template <class Run>
Tensor run_self_attention_backward(const SelfAttentionBackwardArguments& a, Run&& run) {
  const Tensor grad_qkv = at::empty_like(a.qkv);
  const Tensor written = with_unit_column_stride(grad_qkv);
  run_backward(a.separate(), run, {part_of(written, kQuery), part_of(written, kKey), part_of(written, kValue)});
  return written.is_same(grad_qkv) ? grad_qkv : grad_qkv.copy_(written);
}

}  // namespace torch_attn::ops
