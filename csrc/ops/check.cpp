#include "ops/check.h"

#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <sstream>

namespace torch_attn::ops {
namespace {

std::string dtype_text(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }
std::string dtype_text(const Tensor& tensor) { return dtype_text(tensor.scalar_type()); }

constexpr const char* kSupportedDtypes = "float64, float32, bfloat16 or float16";

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_device(const Tensor& tensor, const char* name, const Tensor& query) {
  TORCH_CHECK(tensor.device() == query.device(), "attention: ", name, " must be on query's device, ", query.device(),
              ", but it is on ", tensor.device(), ".");
}

void check_tensors(const ForwardArguments& a) {
  const auto check_one = [&](const Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.dim() == 4, "attention: ", name,
                " must have 4 dimensions, (batch, heads, length, head_dim), but its shape is ", shape_text(tensor),
                ".");
    TORCH_CHECK(tensor.scalar_type() == a.query.scalar_type(),
                "attention: query, key and value must have the same dtype, but query is ", dtype_text(a.query), " and ",
                name, " is ", dtype_text(tensor), ".");
    check_device(tensor, name, a.query);
  };
  check_one(a.query, "query");
  check_one(a.key, "key");
  check_one(a.value, "value");
  TORCH_CHECK(is_supported(a.query.scalar_type()), "attention: query, key and value must be ", kSupportedDtypes,
              ", but they are ", dtype_text(a.query), ".");

  const auto check_same = [&](int64_t dim, const Tensor& left, const char* left_name, const Tensor& right,
                              const char* right_name, const char* what) {
    TORCH_SYM_CHECK(left.sym_size(dim).sym_eq(right.sym_size(dim)), "attention: ", left_name, " and ", right_name,
                    " must have the same ", what, ", but their shapes are ", shape_text(left), " and ",
                    shape_text(right), ".");
  };
  if (is_paged(a.options)) {
    check_same(0, a.key, "key", a.value, "value", "number of blocks");
  } else {
    check_same(0, a.query, "query", a.key, "key", "batch size");
    check_same(0, a.query, "query", a.value, "value", "batch size");
  }
  check_same(3, a.query, "query", a.key, "key", "head_dim (last dimension)");
  check_same(1, a.key, "key", a.value, "value", "number of heads");
  check_same(2, a.key, "key", a.value, "value", "length");

  const SymInt heads = a.query.sym_size(1), kv_heads = a.key.sym_size(1);
  TORCH_CHECK(heads == kv_heads || (kv_heads != 0 && heads % kv_heads == 0),
              "attention: query's number of heads must be a multiple of key's and value's, but query has ", heads,
              " heads and key and value have ", kv_heads, ".");
}

void check_mask(const Tensor& mask, const Tensor& query, const Sizes& s) {
  const auto type = mask.scalar_type();
  TORCH_CHECK(type == at::kBool || type == query.scalar_type() || type == at::kFloat || type == at::kDouble,
              "attention: attn_mask must be bool, float32, float64 or of query's dtype, ", dtype_text(query),
              ", but it is ", dtype_text(mask), ".");
  check_device(mask, "attn_mask", query);
  TORCH_CHECK(mask.dim() == 4,
              "attention: attn_mask must have 4 dimensions, (batch, heads, query_length, key_length) "
              "or sizes of 1, but its shape is ",
              shape_text(mask), ".");
  check_mask_broadcasts(mask, {s.batch, s.heads, s.query_length, s.key_length});
}

void check_per_head(const Tensor& tensor, const char* name, const Tensor& query, bool matches,
                    const std::string& expected) {
  TORCH_CHECK(matches, "attention: ", name, " must have shape ", expected, ", but its shape is ", shape_text(tensor),
              ".");
  TORCH_CHECK(is_supported(tensor.scalar_type()), "attention: ", name, " must be ", kSupportedDtypes, ", but it is ",
              dtype_text(tensor), ".");
  check_device(tensor, name, query);
}

void check_integers(const Tensor& tensor, const char* name, const Tensor& query) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, "attention: ", name,
              " must be int64 or int32, but it is ", dtype_text(tensor), ".");
  check_device(tensor, name, query);
}

// Where the rows of batch entries lie, if not in dimensions of their own.
void check_places(const ForwardArguments& a) {
  const Options& o = a.options;
  if (!is_packed(o) && !is_paged(o)) return;
  TORCH_CHECK(!is_defined(o.attn_mask), "attention: attn_mask cannot be combined with packed sequences or pages.");
  const auto check_starts = [&](const OptionalTensor& starts, const std::optional<SymInt>& longest, const char* name,
                                const char* longest_name, const Tensor& rows) {
    if (!is_defined(starts)) return;
    check_integers(*starts, name, a.query);
    TORCH_CHECK(starts->dim() == 1 && starts->sym_size(0) >= 1, "attention: ", name,
                " must have shape (sequences + 1,), but its shape is ", shape_text(*starts), ".");
    TORCH_CHECK(longest.has_value(), "attention: ", name, " is given without ", longest_name, ".");
    TORCH_CHECK_VALUE(*longest >= 0, "attention: ", longest_name, " must be at least 0, but it is ", *longest, ".");
    TORCH_CHECK(rows.sym_size(0) == 1, "attention: packed sequences have one batch dimension of 1, but the shape is ",
                shape_text(rows), ".");
  };
  check_starts(o.cu_seqlens_q, o.max_seqlen_q, "cu_seqlens_q", "max_seqlen_q", a.query);
  check_starts(o.cu_seqlens_k, o.max_seqlen_k, "cu_seqlens_k", "max_seqlen_k", a.key);
  if (is_paged(o)) {
    check_integers(*o.block_table, "block_table", a.query);
    TORCH_CHECK(o.block_table->dim() == 2,
                "attention: block_table must have 2 dimensions, (batch, blocks of a sequence), but its shape is ",
                shape_text(*o.block_table), ".");
  }
  if (is_defined(o.cu_seqlens_k)) {
    TORCH_CHECK(is_defined(o.cu_seqlens_q) && o.cu_seqlens_k->sym_size(0) == o.cu_seqlens_q->sym_size(0),
                "attention: cu_seqlens_q and cu_seqlens_k must be of as many sequences, but their shapes are ",
                is_defined(o.cu_seqlens_q) ? shape_text(*o.cu_seqlens_q) : "None", " and ", shape_text(*o.cu_seqlens_k),
                ".");
    TORCH_CHECK(!is_paged(o), "attention: cu_seqlens_k must be None where block_table says where keys are.");
  }
  if (!is_paged(o)) {
    TORCH_CHECK(is_defined(o.cu_seqlens_k), "attention: packed queries need cu_seqlens_k or block_table.");
    return;
  }
  const SymInt entries = Sizes::of(a).entries;
  TORCH_CHECK(o.block_table->sym_size(0) == entries,
              "attention: block_table must have shape (batch, blocks of a sequence), of batch ", entries,
              ", but its shape is ", shape_text(*o.block_table), ".");
  TORCH_CHECK(is_defined(o.key_lengths), "attention: block_table is given without key_lengths.");
  const auto check_cache = [](const Tensor& cache, const char* name) {
    TORCH_CHECK(cache.sym_size(2) >= 1, "attention: the blocks of ", name, " must have at least one row.");
    TORCH_CHECK(cache.sym_size(3) <= 1 || cache.sym_stride(3) == 1, "attention: ", name,
                " in blocks must have a stride of 1 in its last dimension, but the stride is ", cache.sym_stride(3),
                ".");
  };
  check_cache(a.key, "key");
  check_cache(a.value, "value");
}

void check_options(const ForwardArguments& a) {
  const Options& o = a.options;
  const Sizes s = Sizes::of(a);

  TORCH_CHECK_VALUE(o.dropout_p >= 0 && o.dropout_p <= 1, "attention: dropout_p must be between 0 and 1, but it is ",
                    o.dropout_p, ".");
  TORCH_CHECK_VALUE(o.softcap >= 0, "attention: softcap must be 0 (off) or positive, but it is ", o.softcap, ".");
  const auto check_window = [](const std::optional<SymInt>& window, const char* name) {
    if (window.has_value())
      TORCH_CHECK_VALUE(window->sym_ge(0).expect_true(__FILE__, __LINE__), "attention: ", name,
                        " must be None (no bound) or an integer of at least 0, but it is ", *window, ".");
  };
  check_window(o.window_left, "window_left");
  check_window(o.window_right, "window_right");
  parse_alignment(o.causal_alignment);

  if (is_defined(o.attn_mask)) check_mask(*o.attn_mask, a.query, s);
  const auto check_heads = [&](const OptionalTensor& tensor, const char* name) {
    if (!is_defined(tensor)) return;
    const bool matches = tensor->dim() == 1 ? has_shape(*tensor, {s.heads}) : has_shape(*tensor, {s.entries, s.heads});
    check_per_head(*tensor, name, a.query, matches,
                   "(heads,) = " + shape_text({s.heads}) + " or (batch, heads) = " + shape_text({s.entries, s.heads}));
  };
  check_heads(o.alibi_slopes, "alibi_slopes");
  check_heads(o.sinks, "sinks");
  if (is_defined(o.key_lengths)) {
    const Tensor& lengths = *o.key_lengths;
    TORCH_CHECK(has_shape(lengths, {s.entries}),
                "attention: key_lengths must have shape (batch,) = ", shape_text({s.entries}), ", but its shape is ",
                shape_text(lengths), ".");
    check_integers(lengths, "key_lengths", a.query);
  }
}

void check_tangent(const OptionalTensor& tangent, const Tensor& primal, const char* name, const char* op) {
  if (!is_defined(tangent)) return;
  TORCH_CHECK(has_shape(*tangent, primal.sym_sizes()), op, ": ", name, " must have the shape of its primal, ",
              shape_text(primal), ", but its shape is ", shape_text(*tangent), ".");
  TORCH_CHECK(tangent->scalar_type() == primal.scalar_type(), op, ": ", name, " must have the dtype of its primal, ",
              dtype_text(primal), ", but it is ", dtype_text(*tangent), ".");
  check_device(*tangent, name, primal);
}

void check_tangents(const Tangents& t, const ForwardArguments& a, const char* op) {
  check_tangent(t.query, a.query, "tangent_query", op);
  check_tangent(t.key, a.key, "tangent_key", op);
  check_tangent(t.value, a.value, "tangent_value", op);
  const auto check_option = [op](const OptionalTensor& tangent, const OptionalTensor& primal, const char* name) {
    if (!is_defined(tangent)) return;
    TORCH_CHECK(is_defined(primal), op, ": ", name, " is given, but the call has no primal of it.");
    check_tangent(tangent, *primal, name, op);
  };
  check_option(t.attn_mask, a.options.attn_mask, "tangent_attn_mask");
  check_option(t.alibi_slopes, a.options.alibi_slopes, "tangent_alibi_slopes");
  check_option(t.sinks, a.options.sinks, "tangent_sinks");
}

}  // namespace

bool has_shape(const Tensor& tensor, c10::SymIntArrayRef sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dim = 0;
  for (const SymInt& size : sizes)
    if (!tensor.sym_size(dim++).sym_eq(size).expect_true(__FILE__, __LINE__)) return false;
  return true;
}

void check_rng_state(const Tensor& state, const char* op) {
  TORCH_CHECK(has_shape(state, {kRngStateSize}) && state.scalar_type() == at::kLong, op,
              ": rng_state must be an int64 tensor of shape (3,), but it is of dtype ", dtype_text(state),
              " and shape ", shape_text(state), ".");
}

std::string shape_text(c10::SymIntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}
std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sym_sizes()); }

void check_mask_broadcasts(const Tensor& attn_mask, c10::SymIntArrayRef expected) {
  const auto sizes = attn_mask.sym_sizes();
  bool matches = sizes.size() <= expected.size();
  for (size_t i = 1; matches && i <= sizes.size(); ++i) {
    const SymInt &size = sizes[sizes.size() - i], &wanted = expected[expected.size() - i];
    matches = TORCH_GUARD_OR_FALSE(size.sym_eq(1)) || size.sym_eq(wanted).expect_true(__FILE__, __LINE__);
  }
  const std::string names =
      expected.size() == 4 ? "(batch, heads, query_length, key_length)" : "(..., heads, query_length, key_length)";
  TORCH_CHECK(matches, "attention: attn_mask must be broadcastable to ", names, " = ", shape_text(expected),
              ", but its shape is ", shape_text(attn_mask), ".");
}

Alignment parse_alignment(std::string_view name) {
  TORCH_CHECK_VALUE(name == "top_left" || name == "bottom_right",
                    "attention: causal_alignment must be \"top_left\" or \"bottom_right\", but it is \"", name, "\".");
  return name == "top_left" ? Alignment::kTopLeft : Alignment::kBottomRight;
}

void check_arguments(const ForwardArguments& arguments) {
  check_tensors(arguments);
  check_places(arguments);
  check_options(arguments);
  if (is_defined(arguments.rng_state)) check_rng_state(*arguments.rng_state, "attention");
}

void check_arguments(const JvpArguments& a) {
  check_arguments(a.forward());
  TORCH_CHECK(!is_paged(a.options), "attention_jvp: keys in pages (block_table) have no derivatives.");
  check_tangents(a.tangents, a.forward(), "attention_jvp");
}

void check_arguments(const BackwardJvpArguments& a) {
  check_arguments(a.backward());
  check_tangents(a.tangents, a.backward().forward(), "attention_backward_jvp");
  const auto check_like = [](const OptionalTensor& tangent, const Tensor& primal, const char* name) {
    check_tangent(tangent, primal, name, "attention_backward_jvp");
  };
  check_like(a.tangent_out, a.out, "tangent_out");
  check_like(a.tangent_logsumexp, a.logsumexp, "tangent_logsumexp");
  check_like(a.tangent_grad_out, a.grad_out, "tangent_grad_out");
  check_like(a.tangent_grad_logsumexp, a.logsumexp, "tangent_grad_logsumexp");
}

void check_arguments(const BackwardArguments& a) {
  const ForwardArguments forward = a.forward();
  check_arguments(forward);
  TORCH_CHECK(!is_paged(a.options), "attention_backward: keys in pages (block_table) have no gradients.");
  const Sizes s = Sizes::of(forward);
  const auto check_one = [&](const Tensor& tensor, const char* name, at::ScalarType type, bool matches,
                             c10::ArrayRef<SymInt> expected) {
    TORCH_CHECK(matches, "attention_backward: ", name, " must have shape ", shape_text(expected), ", but its shape is ",
                shape_text(tensor), ".");
    TORCH_CHECK(tensor.scalar_type() == type, "attention_backward: ", name, " must be ", dtype_text(type),
                ", but it is ", dtype_text(tensor), ".");
    check_device(tensor, name, a.query);
  };
  const auto check_like_out = [&](const Tensor& tensor, const char* name) {
    check_one(tensor, name, a.query.scalar_type(), has_shape(tensor, {s.batch, s.heads, s.query_length, s.value_dim}),
              {s.batch, s.heads, s.query_length, s.value_dim});
  };
  const auto check_like_logsumexp = [&](const Tensor& tensor, const char* name) {
    check_one(tensor, name, accumulator_type(a.query.scalar_type()),
              has_shape(tensor, {s.batch, s.heads, s.query_length}), {s.batch, s.heads, s.query_length});
  };
  check_like_out(a.grad_out, "grad_out");
  check_like_out(a.out, "out");
  check_like_logsumexp(a.logsumexp, "logsumexp");
  if (is_defined(a.grad_logsumexp)) check_like_logsumexp(*a.grad_logsumexp, "grad_logsumexp");
  check_rng_state(a.rng_state, "attention_backward");

  const auto check_wanted = [&](Gradient gradient, const OptionalTensor& input, const char* name) {
    TORCH_CHECK(!a.output_mask[gradient] || (is_defined(input) && at::isFloatingType(input->scalar_type())),
                "attention_backward: output_mask asks for the gradient of ", name, ", but ", name,
                is_defined(input) ? " is not of a floating dtype." : " is None.");
  };
  check_wanted(kAttnMask, a.options.attn_mask, "attn_mask");
  check_wanted(kAlibiSlopes, a.options.alibi_slopes, "alibi_slopes");
  check_wanted(kSinks, a.options.sinks, "sinks");
}

void check_arguments(const DropoutArguments& a) {
  check_rng_state(a.rng_state, "dropout_keep_mask");
  TORCH_CHECK_VALUE(a.dropout_p >= 0 && a.dropout_p <= 1,
                    "dropout_keep_mask: dropout_p must be between 0 and 1, but it is ", a.dropout_p, ".");
}

}  // namespace torch_attn::ops
