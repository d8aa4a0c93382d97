#include "ops/make_problem.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "ops/check.h"

namespace torch_attn::ops {
namespace {

ScalarType scalar_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return ScalarType::kFloat64;
    case at::kFloat:
      return ScalarType::kFloat32;
    case at::kBFloat16:
      return ScalarType::kBFloat16;
    case at::kHalf:
      return ScalarType::kFloat16;
    default:
      return ScalarType::kBool;
  }
}

void* data_of(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

int64_t window_bound(const std::optional<SymInt>& window) {
  return window.has_value() ? std::min(window->expect_int(), kUnbounded) : kUnbounded;
}

Tensor checked_key_lengths(const Tensor& key_lengths, int64_t key_length) {
  const Tensor lengths = key_lengths.to(at::kLong).contiguous();
  if (!lengths.is_cpu()) return lengths;
  const int64_t* data = lengths.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < lengths.numel(); ++i)
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] <= key_length,
                      "attention: key_lengths must be between 0 and key's length, ", key_length, ", but key_lengths[",
                      i, "] is ", data[i], ".");
  return lengths;
}

}  // namespace

void set_rng_state(AttentionProblem& p, const Tensor& rng_state) {
  TORCH_CHECK(rng_state.is_contiguous(), "attention: rng_state must be contiguous, but its stride is ",
              rng_state.stride(0), ".");
  const int64_t* state = rng_state.const_data_ptr<int64_t>();
  if (!rng_state.is_cpu()) {  // in device memory: the kernel reads it
    p.rng_state = state;
    return;
  }
  p.philox_seed = static_cast<uint64_t>(state[0]);
  p.philox_offset = static_cast<uint64_t>(state[1]);
  p.dropout_batches = state[2];
}

Tensor with_unit_column_stride(const Tensor& tensor) {
  const bool is_unit = tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
  return is_unit ? tensor : tensor.contiguous();
}

TensorView view_of(const Tensor& tensor) {
  TensorView view;
  view.data = data_of(tensor);
  view.dtype = scalar_type_of(tensor);
  for (int64_t dim = 0; dim < 4; ++dim) view.stride[dim] = tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
  return view;
}

TensorView view_of_matrix(const Tensor& tensor) {
  TensorView view = view_of(tensor);
  view.stride[3] = 1;
  return view;
}

TensorView view_per_head(const Tensor& tensor) {
  TensorView view;
  view.data = data_of(tensor);
  view.dtype = scalar_type_of(tensor);
  view.stride[0] = tensor.dim() == 2 ? tensor.stride(0) : 0;
  view.stride[1] = tensor.stride(-1);
  return view;
}

PreparedProblem make_problem(const ForwardArguments& a, const Tensor& rng_state) {
  check_arguments(a);
  const Options& o = a.options;
  PreparedProblem prepared;
  auto& [p, tensors] = prepared;

  p.batch = a.query.size(0);
  p.heads = a.query.size(1);
  p.kv_heads = a.key.size(1);
  p.query_length = a.query.size(2);
  p.key_length = a.key.size(2);
  p.head_dim = a.query.size(3);
  p.value_dim = a.value.size(3);
  p.dtype = scalar_type_of(a.query);

  size_t used = 0;
  const auto keep = [&](Tensor tensor) -> const Tensor& { return tensors[used++] = std::move(tensor); };
  const auto matrix = [&](const Tensor& tensor) { return view_of_matrix(keep(with_unit_column_stride(tensor))); };
  p.query = matrix(a.query);
  p.key = matrix(a.key);
  p.value = matrix(a.value);

  // Without columns every score is 0; 1 / sqrt(0) would make it NaN.
  p.scale = o.scale.has_value() ? *o.scale : p.head_dim > 0 ? 1 / std::sqrt(static_cast<double>(p.head_dim)) : 1.0;
  p.softcap = o.softcap;
  if (is_defined(o.attn_mask)) p.attn_mask = view_of(keep(*o.attn_mask));
  const auto accumulator = accumulator_type(a.query.scalar_type());
  if (is_defined(o.alibi_slopes)) p.alibi_slopes = view_per_head(keep(o.alibi_slopes->to(accumulator)));
  if (is_defined(o.sinks)) p.sinks = view_per_head(keep(o.sinks->to(accumulator)));

  p.window_left = window_bound(o.window_left);
  p.window_right = o.is_causal ? 0 : window_bound(o.window_right);
  p.alignment = parse_alignment(o.causal_alignment);
  if (is_defined(o.key_lengths))
    p.key_lengths = keep(checked_key_lengths(*o.key_lengths, p.key_length)).const_data_ptr<int64_t>();

  p.dropout_p = o.dropout_p;
  if (p.dropout_p > 0) set_rng_state(p, rng_state);
  return prepared;
}

AttentionProblem make_dropout_problem(const DropoutArguments& a) {
  check_arguments(a);
  AttentionProblem p;
  p.batch = a.batch.expect_int();
  p.heads = p.kv_heads = a.heads.expect_int();
  p.query_length = a.query_length.expect_int();
  p.key_length = a.key_length.expect_int();
  p.dropout_p = a.dropout_p;
  set_rng_state(p, a.rng_state);
  return p;
}

}  // namespace torch_attn::ops
