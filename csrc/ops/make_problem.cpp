#include "ops/make_problem.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "core/dropout.h"
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

// Fills in where packed sequences start, as int64, and the longest one's length: where the numbers cannot be read
// without waiting for a GPU, the length that the caller names.
void set_starts(const Tensor& cu_seqlens, const SymInt& max_seqlen, int64_t rows, const char* suffix, Tensor& starts,
                int64_t& longest) {
  starts = cu_seqlens.to(at::kLong).contiguous();
  longest = std::min(max_seqlen.expect_int(), rows);
  if (!starts.is_cpu()) return;
  const int64_t* data = starts.const_data_ptr<int64_t>();
  const int64_t sequences = starts.numel() - 1;
  TORCH_CHECK_VALUE(data[0] == 0, "attention: cu_seqlens_", suffix, " must begin with 0, but it begins with ", data[0],
                    ".");
  longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = data[i + 1] - data[i];
    TORCH_CHECK_VALUE(length >= 0, "attention: cu_seqlens_", suffix, " must not decrease, but cu_seqlens_", suffix, "[",
                      i + 1, "] is ", data[i + 1], " after ", data[i], ".");
    TORCH_CHECK_VALUE(length <= max_seqlen.expect_int(), "attention: max_seqlen_", suffix,
                      " must be at least the longest sequence's length, but it is ", max_seqlen, " and sequence ", i,
                      " has length ", length, ".");
    longest = std::max(longest, length);
  }
  TORCH_CHECK_VALUE(data[sequences] <= rows, "attention: cu_seqlens_", suffix, " must end at no more than the ", rows,
                    " rows that there are, but it ends with ", data[sequences], ".");
}

// Pages that are read at all must exist; table entries behind a sequence's last key may hold anything.
void check_pages(const Tensor& table, const Tensor& key_lengths, int64_t page_rows, int64_t pages) {
  const int64_t* lengths = key_lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < table.size(0); ++b) {
    const int32_t* row = table.const_data_ptr<int32_t>() + b * table.size(1);
    for (int64_t i = 0; i * page_rows < lengths[b]; ++i)
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < pages, "attention: block_table must hold numbers of the cache's ",
                        pages, " blocks, but block_table[", b, ", ", i, "] is ", row[i], ".");
  }
}

// key_starts: null, or where packed keys start.
Tensor checked_key_lengths(const Tensor& key_lengths, int64_t key_length, const int64_t* key_starts) {
  const Tensor lengths = key_lengths.to(at::kLong).contiguous();
  if (!lengths.is_cpu()) return lengths;
  const int64_t* data = lengths.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < lengths.numel(); ++i) {
    const int64_t most = key_starts == nullptr ? key_length : key_starts[i + 1] - key_starts[i];
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] <= most, "attention: key_lengths must be between 0 and key's length, ",
                      most, ", but key_lengths[", i, "] is ", data[i], ".");
  }
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
  return make_checked_problem(a, rng_state);
}

PreparedProblem make_checked_problem(const ForwardArguments& a, const Tensor& rng_state) {
  const Options& o = a.options;
  PreparedProblem prepared;
  AttentionProblem& p = prepared.problem;

  const Sizes sizes = Sizes::of(a);
  p.batch = sizes.entries.expect_int();
  p.heads = a.query.size(1);
  p.kv_heads = a.key.size(1);
  p.query_length = a.query.size(2);
  p.key_length = sizes.key_length.expect_int();
  p.head_dim = a.query.size(3);
  p.value_dim = a.value.size(3);
  p.dtype = scalar_type_of(a.query);

  size_t used = 0;
  const auto keep = [&](Tensor tensor) -> const Tensor& { return prepared.tensors[used++] = std::move(tensor); };
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
  if (is_defined(o.cu_seqlens_q)) {
    p.packed_rows = p.query_length;
    set_starts(*o.cu_seqlens_q, *o.max_seqlen_q, p.packed_rows, "q", prepared.query_starts, p.query_length);
    p.query_starts = prepared.query_starts.const_data_ptr<int64_t>();
  }
  if (is_defined(o.cu_seqlens_k)) {
    set_starts(*o.cu_seqlens_k, *o.max_seqlen_k, p.key_length, "k", prepared.key_starts, p.key_length);
    p.key_starts = prepared.key_starts.const_data_ptr<int64_t>();
  }
  if (is_defined(o.key_lengths)) {
    const Tensor& lengths = keep(checked_key_lengths(*o.key_lengths, p.key_length, p.key_starts));
    p.key_lengths = lengths.const_data_ptr<int64_t>();
    if (is_paged(o)) {
      const Tensor& table = keep(o.block_table->to(at::kInt).contiguous());
      const int64_t page_rows = a.key.size(2);
      if (table.is_cpu()) {
        check_pages(table, lengths, page_rows, a.key.size(0));
        p.key_length = p.batch > 0 ? *std::max_element(p.key_lengths, p.key_lengths + p.batch) : 0;
      }
      for (TensorView* view : {&p.key, &p.value}) {
        view->pages = table.const_data_ptr<int32_t>();
        view->pages_stride = table.size(1);
        view->page_rows = page_rows;
      }
    }
  }

  p.dropout_p = Dropout::rounded(o.dropout_p);
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
  p.dropout_p = Dropout::rounded(a.dropout_p);
  set_rng_state(p, a.rng_state);
  return p;
}

}  // namespace torch_attn::ops
