// torch_attn::varlen_attention and paged_attention: what users call, by attention_forward. Packed rows (rows, heads,
// dim) are its (1, heads, rows, dim), and blocks (blocks, block_size, heads, dim) its (blocks, heads, block_size, dim).
#include "ops/varlen.h"

#include "ops/check.h"

namespace torch_attn::ops {
namespace {

void check_rank(const char* op, const Tensor& t, const char* name, int64_t rank, const char* names) {
  TORCH_CHECK(t.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, ", names, ", but its shape is ",
              shape_text(t), ".");
}

void check_heads(const char* op, const SymInt& heads, const SymInt& kv_heads, bool enable_gqa) {
  TORCH_CHECK(enable_gqa || heads == kv_heads, op, ": query has ", heads, " heads and key and value have ", kv_heads,
              ": the numbers must be equal, or pass enable_gqa=True to let groups of query heads share a key/value "
              "head.");
}

constexpr const char* kBlocks = "(blocks, block_size, heads, head_dim)";

ForwardResult varlen_forward(const VarlenArguments& a) {
  constexpr const char* kOp = "varlen_attention";
  constexpr const char* kRows = "(rows of all sequences, heads, head_dim)";
  const bool paged = is_defined(a.block_table);
  check_rank(kOp, a.query, "query", 3, kRows);
  check_rank(kOp, a.key, "key", paged ? 4 : 3, paged ? kBlocks : kRows);
  check_rank(kOp, a.value, "value", paged ? 4 : 3, paged ? kBlocks : kRows);
  TORCH_CHECK(paged || is_defined(a.cu_seqlens_k), kOp, ": cu_seqlens_k may be None only with block_table.");
  check_heads(kOp, a.query.sym_size(1), a.key.sym_size(-2), a.enable_gqa);
  const auto rows = [](const Tensor& t) { return t.transpose(0, 1).unsqueeze(0); };
  const auto key_rows = [&](const Tensor& t) { return paged ? t.transpose(1, 2) : rows(t); };
  return AttentionForward::call({rows(a.query), key_rows(a.key), key_rows(a.value), a.options(), std::nullopt});
}

// (1, heads, rows, dim) to (rows, heads, dim)
Tensor packed(const Tensor& out) { return out.squeeze(0).transpose(0, 1); }

Tensor varlen_attention(const VarlenArguments& a) { return packed(std::get<0>(varlen_forward(a))); }

std::tuple<Tensor, Tensor> varlen_attention_with_logsumexp(const VarlenArguments& a) {
  const auto [out, logsumexp, rng_state] = varlen_forward(a);
  return {packed(out), logsumexp.squeeze(0)};
}

ForwardResult paged_forward(const PagedArguments& a) {
  constexpr const char* kOp = "paged_attention";
  check_rank(kOp, a.query, "query", 4, "(batch, heads, length, head_dim)");
  check_rank(kOp, a.key_cache, "key_cache", 4, kBlocks);
  check_rank(kOp, a.value_cache, "value_cache", 4, kBlocks);
  check_heads(kOp, a.query.sym_size(1), a.key_cache.sym_size(2), a.enable_gqa);
  return AttentionForward::call(
      {a.query, a.key_cache.transpose(1, 2), a.value_cache.transpose(1, 2), a.options(), std::nullopt});
}

Tensor paged_attention(const PagedArguments& a) { return std::get<0>(paged_forward(a)); }

std::tuple<Tensor, Tensor> paged_attention_with_logsumexp(const PagedArguments& a) {
  const auto [out, logsumexp, rng_state] = paged_forward(a);
  return {out, logsumexp};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) {
  m.impl("varlen_attention", VarlenAttention::kernel<varlen_attention>);
  m.impl("varlen_attention_with_logsumexp", VarlenAttentionWithLogsumexp::kernel<varlen_attention_with_logsumexp>);
  m.impl("paged_attention", PagedAttention::kernel<paged_attention>);
  m.impl("paged_attention_with_logsumexp", PagedAttentionWithLogsumexp::kernel<paged_attention_with_logsumexp>);
}
// vmap, whose rules refuse such calls, is not covered by the alias above.
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("varlen_attention", VarlenAttention::kernel<varlen_attention>);
  m.impl("varlen_attention_with_logsumexp", VarlenAttentionWithLogsumexp::kernel<varlen_attention_with_logsumexp>);
  m.impl("paged_attention", PagedAttention::kernel<paged_attention>);
  m.impl("paged_attention_with_logsumexp", PagedAttentionWithLogsumexp::kernel<paged_attention_with_logsumexp>);
}

}  // namespace torch_attn::ops
