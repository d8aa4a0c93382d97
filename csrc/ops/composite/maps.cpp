// torch_attn::attention_statistics and attention_weights: what users pass, with a choice of heads and rows, in the
// terms of the operators that kernels implement. ATen operators only, so every transform applies.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/where.h>
#include <c10/core/SymBool.h>

#include "ops/check.h"
#include "ops/composite/canonical.h"
#include "ops/map_operators.h"

namespace torch_attn::ops {
namespace {

bool is_one(const SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }

template <class Arguments>
Canonical canonical_of(const Arguments& a) {
  return Canonical({a.query, a.key, without_columns(a.key), a.options.options(), a.enable_gqa});
}

StatisticsResult attention_statistics(const StatisticsCallArguments& a) {
  const Canonical canonical = canonical_of(a);
  const ForwardArguments& f = canonical.arguments();
  auto results = AttentionStatisticsForward::call(
      {f.query, f.key, ScoreOptions::of(f.options), a.top_k, a.mass_window, a.column_sum});
  const auto restore = [&](Tensor& t) { t = canonical.restore(t); };
  for (Tensor* t : {&std::get<kLogsumexp>(results), &std::get<kEntropy>(results), &std::get<kMaxWeight>(results),
                    &std::get<kArgmax>(results), &std::get<kMeanDistance>(results)})
    restore(*t);
  if (a.mass_window.has_value()) restore(std::get<kWindowMass>(results));
  if (a.top_k > 0) {
    restore(std::get<kTopWeights>(results));
    restore(std::get<kTopIndices>(results));
  }
  if (a.column_sum) restore(std::get<kColumnSum>(results));
  return results;
}

// Chosen entries of one dimension: a view where they lie in a row, else a copy.
Tensor select(const Tensor& t, int64_t dim, const std::vector<int64_t>& entries) {
  const bool in_a_row = std::adjacent_find(entries.begin(), entries.end(), [](int64_t left, int64_t right) {
                          return right != left + 1;
                        }) == entries.end();
  if (in_a_row) return t.narrow(dim, entries.empty() ? 0 : entries[0], static_cast<int64_t>(entries.size()));
  std::vector<Tensor> parts;
  for (const int64_t entry : entries) parts.push_back(t.narrow(dim, entry, 1));
  return at::cat(parts, dim);
}

// The call for these heads alone, in this order.
void select_heads(WeightsArguments& a, c10::IntArrayRef heads) {
  const SymInt count = a.query.sym_size(1), kv_heads = a.key.sym_size(1);
  std::vector<int64_t> chosen(heads.begin(), heads.end()), kv_chosen;
  for (size_t i = 0; i < chosen.size(); ++i)
    TORCH_CHECK_INDEX(count.sym_gt(chosen[i]).expect_true(__FILE__, __LINE__) && chosen[i] >= 0,
                      "attention_weights: heads must be indices from 0 to ", count - 1, ", but heads[", i, "] is ",
                      chosen[i], ".");
  if (!is_one(kv_heads)) {
    const int64_t group = (count / kv_heads).guard_int(__FILE__, __LINE__);
    for (const int64_t head : chosen) kv_chosen.push_back(head / group);
    a.key = select(a.key, 1, kv_chosen);
  }
  a.query = select(a.query, 1, chosen);
  const auto choose = [&](OptionalTensor& t, int64_t dim) {
    if (is_defined(t) && (dim < 0 || !is_one(t->sym_size(dim)))) t = select(*t, dim < 0 ? t->dim() - 1 : dim, chosen);
  };
  choose(a.options.attn_mask, 1);
  choose(a.options.alibi_slopes, -1);
  choose(a.options.sinks, -1);
  choose(a.logsumexp, 1);
}

// The call for these rows alone, in this order.
void select_rows(WeightsArguments& a, const Tensor& queries) {
  TORCH_CHECK(queries.dim() == 1 && c10::isIntegralType(queries.scalar_type(), /*includeBool=*/false),
              "attention_weights: queries must be a one-dimensional tensor of integers, but its shape is ",
              shape_text(queries), " and its dtype ", queries.dtype(), ".");
  const SymInt length = a.query.sym_size(2);
  const Tensor indices = queries.to(a.query.device(), at::kLong);
  const Tensor rows = at::where(indices < 0, indices + length, indices);
  const auto choose = [&](const Tensor& t) { return at::index_select(t, 2, rows); };
  a.query = choose(a.query);
  if (is_defined(a.options.attn_mask) && !is_one(a.options.attn_mask->sym_size(2)))
    a.options.attn_mask = choose(*a.options.attn_mask);
  if (is_defined(a.logsumexp)) a.logsumexp = choose(*a.logsumexp);
  a.selected = {rows, length};
}

template <class HeadsType>
Tensor attention_weights(const WeightsCallArguments<HeadsType>& a) {
  const Canonical canonical = canonical_of(a);
  const ForwardArguments& f = canonical.arguments();
  WeightsArguments call{f.query, f.key, ScoreOptions::of(f.options), std::nullopt, {}, false};
  if (is_defined(a.logsumexp)) call.logsumexp = canonical.collapse_per_row(*a.logsumexp, "logsumexp");
  check_arguments(call);
  if constexpr (std::is_same_v<HeadsType, std::string_view>) {
    TORCH_CHECK_VALUE(a.heads == "all" || a.heads == "mean",
                      "attention_weights: heads must be \"all\", \"mean\" or a list of indices, but it is \"", a.heads,
                      "\".");
    call.mean = a.heads == "mean";
  } else {
    select_heads(call, a.heads);
  }
  if (is_defined(a.queries)) select_rows(call, *a.queries);
  const Tensor weights = std::get<0>(AttentionWeightsForward::call(call));
  return call.mean ? canonical.restore_without_heads(weights) : canonical.restore(weights);
}

}  // namespace

#define TORCH_ATTN_MAPS(m)                                                                    \
  m.impl("attention_statistics", AttentionStatistics::kernel<attention_statistics>);          \
  m.impl("attention_weights", AttentionWeights<std::string_view>::kernel<attention_weights>); \
  m.impl("attention_weights.heads", AttentionWeights<c10::IntArrayRef>::kernel<attention_weights>)

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) { TORCH_ATTN_MAPS(m); }
// vmap: the alias above does not cover it.
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) { TORCH_ATTN_MAPS(m); }

}  // namespace torch_attn::ops
