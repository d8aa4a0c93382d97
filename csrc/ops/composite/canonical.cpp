#include "ops/composite/canonical.h"

#include <ATen/ExpandUtils.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "ops/check.h"

namespace torch_attn::ops {
namespace {

using SymSizes = c10::SymDimVector;

// Everything before (heads, length, head_dim).
SymSizes leading_sizes(const Tensor& t) {
  const auto sizes = t.sym_sizes();
  return t.dim() <= 3 ? SymSizes{} : SymSizes(sizes.begin(), sizes.end() - 3);
}

bool is_one(const SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }

// Leading dimensions, each of its own size or 1, to one batch dimension.
Tensor to_four_dimensions(const Tensor& tensor, const SymSizes& leading) {
  Tensor t = tensor;
  while (t.dim() < 3) t = t.unsqueeze(0);
  SymSizes sizes = leading;
  for (int64_t dim = -3; dim < 0; ++dim) sizes.push_back(t.sym_size(dim));
  t = t.expand_symint(sizes);
  return leading.empty() ? t.unsqueeze(0) : t.flatten(0, static_cast<int64_t>(leading.size()) - 1);
}

// The same, but leading dimensions that are all 1 stay so, and with them the mask's gradient stays small.
Tensor mask_to_four_dimensions(const Tensor& mask, const SymSizes& leading) {
  Tensor t = mask;
  while (t.dim() < 4) t = t.unsqueeze(0);
  const SymSizes own = leading_sizes(t);
  if (std::all_of(own.begin(), own.end(), is_one)) return t.dim() > 4 ? t.flatten(0, -4) : t;
  return leading.size() == 1 ? t : to_four_dimensions(t, leading);
}

}  // namespace

Canonical::Canonical(const AttentionArguments& a) : arguments_(a.forward()) {
  const ForwardArguments& f = arguments_;
  check_ranks(f);
  is_canonical_ = f.query.dim() == 4 && f.key.dim() == 4 && f.value.dim() == 4 &&
                  f.query.sym_size(0) == f.key.sym_size(0) && f.query.sym_size(0) == f.value.sym_size(0) &&
                  (!is_defined(f.options.attn_mask) || f.options.attn_mask->dim() == 4);
  if (!is_canonical_) collapse_leading_dimensions();
  match_heads(a.enable_gqa);
}

Tensor Canonical::restore(const Tensor& t) const {
  if (is_canonical_ || leading_.size() == 1) return t;
  if (!leading_.empty()) return t.unflatten_symint(0, leading_);
  return has_heads_ ? t.squeeze(0) : t.squeeze(0).squeeze(0);
}

Tensor Canonical::restore_without_heads(const Tensor& t) const {
  if (is_canonical_ || leading_.size() == 1) return t;
  return leading_.empty() ? t.squeeze(0) : t.unflatten_symint(0, leading_);
}

Tensor Canonical::collapse_per_row(const Tensor& t, const char* name) const {
  if (is_canonical_ || leading_.size() == 1) return t;
  const auto rank = static_cast<int64_t>(leading_.size());
  const int64_t wanted = leading_.empty() && !has_heads_ ? 1 : rank + 2;
  TORCH_CHECK(t.dim() == wanted, "attention: ", name, " must have ", wanted,
              " dimensions, those of a number per query row, but its shape is ", shape_text(t), ".");
  if (leading_.empty()) return has_heads_ ? t.unsqueeze(0) : t.unsqueeze(0).unsqueeze(0);
  return t.flatten(0, rank - 1);
}

void Canonical::check_ranks(const ForwardArguments& f) {
  const auto check_one = [](const Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() >= 2, "attention: ", name,
                " must have at least 2 dimensions, (..., heads, length, head_dim) or (length, head_dim), but its shape "
                "is ",
                shape_text(t), ".");
  };
  check_one(f.query, "query");
  check_one(f.key, "key");
  check_one(f.value, "value");
}

void Canonical::collapse_leading_dimensions() {
  ForwardArguments& f = arguments_;
  has_heads_ = std::max({f.query.dim(), f.key.dim(), f.value.dim()}) > 2;
  leading_ = broadcast(broadcast(leading_sizes(f.query), leading_sizes(f.key)), leading_sizes(f.value));
  if (is_defined(f.options.attn_mask)) {
    check_mask_broadcasts(*f.options.attn_mask, mask_sizes(f));
    f.options.attn_mask = mask_to_four_dimensions(*f.options.attn_mask, leading_);
  }
  const auto rank = static_cast<int64_t>(leading_.size());
  if (is_defined(f.options.alibi_slopes) && rank > 1 && f.options.alibi_slopes->dim() == rank + 1)
    f.options.alibi_slopes = f.options.alibi_slopes->flatten(0, rank - 1);
  if (is_defined(f.options.key_lengths) && rank != 1 && f.options.key_lengths->dim() == rank)
    f.options.key_lengths = f.options.key_lengths->reshape({-1});
  f.query = to_four_dimensions(f.query, leading_);
  f.key = to_four_dimensions(f.key, leading_);
  f.value = to_four_dimensions(f.value, leading_);
}

// (batch..., heads, query_length, key_length)
c10::SymDimVector Canonical::mask_sizes(const ForwardArguments& f) const {
  const auto heads = [](const Tensor& t) { return t.dim() < 3 ? SymInt(1) : t.sym_size(-3); };
  SymSizes sizes = leading_;
  if (sizes.empty()) sizes.push_back(1);
  sizes.push_back(is_one(heads(f.query)) ? std::max(heads(f.key), heads(f.value)) : heads(f.query));
  sizes.push_back(f.query.sym_size(-2));
  sizes.push_back(f.key.sym_size(-2));
  return sizes;
}

c10::SymDimVector Canonical::broadcast(const SymSizes& left, const SymSizes& right) const {
  if (left == right) return left;
  SymSizes result(std::max(left.size(), right.size()), SymInt(1));
  for (size_t i = 1; i <= result.size(); ++i) {
    const SymInt l = i <= left.size() ? left[left.size() - i] : SymInt(1);
    const SymInt r = i <= right.size() ? right[right.size() - i] : SymInt(1);
    TORCH_CHECK(
        is_one(l) || is_one(r) || l == r,
        "attention: the leading dimensions of query, key and value must be broadcastable, but their shapes are ",
        shape_text(arguments_.query), ", ", shape_text(arguments_.key), " and ", shape_text(arguments_.value), ".");
    result[result.size() - i] = is_one(l) ? r : l;
  }
  return result;
}

// One key/value head may serve all query heads as it is; other sizes 1 are expanded.
void Canonical::match_heads(bool enable_gqa) {
  const ForwardArguments& f = arguments_;
  const SymInt heads = f.query.sym_size(1), key_heads = f.key.sym_size(1), value_heads = f.value.sym_size(1);
  const SymInt kv_heads = is_one(key_heads) ? value_heads : key_heads;
  const auto expand = [&](Tensor ForwardArguments::* member, const SymInt& to) {
    Tensor& tensor = arguments_.*member;
    tensor = tensor.expand_symint({-1, to, -1, -1});
  };
  if (key_heads != value_heads && is_one(key_heads)) expand(&ForwardArguments::key, kv_heads);
  if (key_heads != value_heads && is_one(value_heads)) expand(&ForwardArguments::value, kv_heads);
  if (enable_gqa || heads == kv_heads || is_one(kv_heads)) return;
  TORCH_CHECK(
      is_one(heads), "attention: query has ", heads, " heads and key and value have ", kv_heads,
      ": the numbers must be equal or one of them 1, or pass enable_gqa=True to let groups of query heads share "
      "a key/value head.");
  expand(&ForwardArguments::query, kv_heads);
}

}  // namespace torch_attn::ops
