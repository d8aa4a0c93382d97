#include "ops/composite/weights.h"

#include <ATen/TensorIndexing.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymFloat.h>

#include <limits>

#include "core/dropout.h"
#include "ops/check.h"
#include "ops/operators.h"
#include "ops/packed.h"

namespace torch_attn::ops::composite {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Which keys a row may attend by its position, and how far away they are (core/mask.h's BandMask).
struct Band {
  Tensor allowed;         // (1 or B, 1, L, S); undefined: all
  Tensor minus_distance;  // the same shape: -|position - key|, for ALiBi
};

// A row's place on the key axis and a key's, (1 or B, 1, L, 1) and (1 or B, 1, 1, S), each in its own sequence; how
// many keys there are for a row, of the first shape; and which keys are of a row's own sequence.
struct Places {
  Tensor row, key, key_count;  // key_count undefined: all
  Tensor same_sequence;        // undefined: all
};

// The sequences of packed rows, how far into them the rows are, and how long they are. The rows after the last one have
// a sequence of their own, of length 0.
struct PackedRows {
  Tensor sequence, position, length;  // (rows)

  PackedRows(const Tensor& cu_seqlens, const SymInt& rows) {
    const Tensor starts = cu_seqlens.to(at::kLong);
    sequence = sequence_of_row(starts, rows);
    position = at::arange(rows, starts.options()) - starts.index_select(0, sequence);
    length = at::constant_pad_nd(starts.diff(), {0, 1}).index_select(0, sequence);
  }
};

Places places_of_packed(const ForwardArguments& a, const Sizes& s) {
  const Options& o = a.options;
  const PackedRows rows(*o.cu_seqlens_q, s.query_length);
  const auto of_rows = [](const Tensor& t) { return t.view_symint({1, 1, -1, 1}); };
  const auto of_keys = [](const Tensor& t) { return t.view_symint({1, 1, 1, -1}); };
  const auto by_row = [&](const Tensor& of_sequence) {
    return at::constant_pad_nd(of_sequence, {0, 1}).index_select(0, rows.sequence);
  };
  Tensor key_sequence, key_position, key_count;
  if (is_paged(o)) {  // compute_weights has laid the pages of all sequences out one after the other
    const SymInt each = s.key_length / s.entries;
    const Tensor key = at::arange(s.key_length, rows.sequence.options());
    key_sequence = key.floor_divide(c10::Scalar(each));
    key_position = key.remainder(c10::Scalar(each));
  } else {
    const PackedRows keys(*o.cu_seqlens_k, s.key_length);
    key_sequence = keys.sequence;
    key_position = keys.position;
    key_count = by_row(o.cu_seqlens_k->to(at::kLong).diff());
  }
  if (is_defined(o.key_lengths)) key_count = by_row(o.key_lengths->to(at::kLong));
  Places places;
  places.row = rows.position;
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight) places.row = places.row + key_count - rows.length;
  places.row = of_rows(places.row);
  places.key = of_keys(key_position);
  places.key_count = of_rows(key_count);
  places.same_sequence =
      (of_rows(rows.sequence) == of_keys(key_sequence)).logical_and(of_rows(rows.sequence) < c10::Scalar(s.entries));
  return places;
}

Places places_of(const ForwardArguments& a, const Sizes& s, const SelectedRows& selected) {
  const Options& o = a.options;
  if (is_defined(o.cu_seqlens_q)) return places_of_packed(a, s);
  const auto integers = a.query.options().dtype(at::kLong);
  const SymInt query_length = selected.query_length.value_or(s.query_length);
  Places places;
  places.key = at::arange(s.key_length, integers);
  places.row = (is_defined(selected.rows) ? *selected.rows : at::arange(s.query_length, integers)).unsqueeze(1);
  if (is_defined(o.key_lengths))
    places.key_count = o.key_lengths->to(at::kLong).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
  if (parse_alignment(o.causal_alignment) == Alignment::kBottomRight)
    places.row = places.row + (places.key_count.defined() ? places.key_count - query_length
                                                          : at::scalar_tensor(s.key_length - query_length, integers));
  return places;
}

Band make_band(const ForwardArguments& a, const Sizes& s, const SelectedRows& selected) {
  const Options& o = a.options;
  const Places places = places_of(a, s, selected);
  const Tensor &key = places.key, &position = places.row;
  Band band;
  const auto restrict_to = [&band](const Tensor& allowed) {
    band.allowed = band.allowed.defined() ? band.allowed.logical_and(allowed) : allowed;
  };
  if (places.same_sequence.defined()) restrict_to(places.same_sequence);
  if (o.is_causal)
    restrict_to(key <= position);
  else if (o.window_right.has_value())
    restrict_to(key <= position + *o.window_right);
  if (o.window_left.has_value()) restrict_to(key >= position - *o.window_left);
  if (places.key_count.defined()) restrict_to(key < places.key_count);
  band.minus_distance = (position - key).abs().neg();
  return band;
}

// The keys or values of a paged cache (blocks, heads, block_size, dim), copied together in their order: (B, heads, S,
// dim) or, for packed queries, (1, heads, B · S, dim).
Tensor gathered_pages(const Tensor& cache, const Options& o) {
  const Tensor table = o.block_table->to(at::kLong).clamp(0, c10::Scalar(cache.sym_size(0) - 1));
  const Tensor rows = cache.index_select(0, table.flatten())
                          .unflatten_symint(0, {table.sym_size(0), table.sym_size(1)})
                          .permute({0, 2, 1, 3, 4})
                          .flatten(2, 3);
  return is_defined(o.cu_seqlens_q) ? rows.transpose(0, 1).flatten(1, 2).unsqueeze(0) : rows;
}

// DropoutKeepMask's bits where they belong.
Tensor kept_weights(const ForwardArguments& a, const Sizes& s, const Tensor& rng_state) {
  const Options& o = a.options;
  if (!is_defined(o.cu_seqlens_q))
    return DropoutKeepMask::call({rng_state, s.batch, s.heads, s.query_length, s.key_length, o.dropout_p});
  const SymInt queries = o.max_seqlen_q->max(1);
  const SymInt keys = (is_defined(o.cu_seqlens_k) ? *o.max_seqlen_k : s.key_length / s.entries).max(1);
  const Tensor bits = DropoutKeepMask::call({rng_state, s.entries + 1, s.heads, queries, keys, o.dropout_p});
  const PackedRows rows(*o.cu_seqlens_q, s.query_length);
  const Tensor key_position = is_defined(o.cu_seqlens_k)
                                  ? PackedRows(*o.cu_seqlens_k, s.key_length).position
                                  : at::arange(s.key_length, rows.position.options()).remainder(c10::Scalar(keys));
  // Bits of rows and keys that meet in no sequence do not matter, as long as there are some.
  const Tensor row_place = rows.position.clamp_max(c10::Scalar(queries - 1)).unsqueeze(1);
  return bits.permute({1, 0, 2, 3})
      .index(
          {at::indexing::Slice(), rows.sequence.unsqueeze(1), row_place, key_position.clamp_max(c10::Scalar(keys - 1))})
      .unsqueeze(0);
}

}  // namespace

Tensor expand_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unsqueeze(2).expand_symint({-1, -1, s.heads / s.kv_heads, -1, -1}).flatten(1, 2);
}
Tensor sum_kv_heads(const Tensor& t, const Sizes& s) {
  if (s.heads == s.kv_heads) return t;
  return t.unflatten_symint(1, {s.kv_heads, s.heads / s.kv_heads}).sum(2);
}

Tensor per_head(const Tensor& t, const Weights& w, const Options& o) {
  const Tensor converted = number_of_row(t.to(w.query.scalar_type()), o, w.sizes.query_length).unsqueeze(-1);
  return converted.dim() == 4 ? converted : converted.unsqueeze(0);
}

Weights compute_weights(const ForwardArguments& a, const Tensor& rng_state, const SelectedRows& selected) {
  const Options& o = a.options;
  Sizes s = Sizes::of(a);
  const auto accumulator = accumulator_type(a.query.scalar_type());
  Tensor key = a.key, value = a.value;
  if (is_paged(o)) {
    key = gathered_pages(key, o);
    value = gathered_pages(value, o);
    s.key_length = key.sym_size(2);
  }
  Weights w;
  w.sizes = s;
  w.dtype = a.query.scalar_type();
  w.softcap = o.softcap;
  w.query = a.query.to(accumulator);
  w.key = expand_kv_heads(key.to(accumulator), s);
  w.value = expand_kv_heads(value.to(accumulator), s);
  w.scale =
      o.scale.has_value() ? c10::Scalar(*o.scale) : c10::Scalar(c10::SymFloat(1.0) / c10::SymFloat(s.head_dim).sqrt());

  w.capped = at::matmul(w.query * w.scale, w.key.transpose(-2, -1));
  if (o.softcap > 0) w.capped = at::tanh(w.capped / o.softcap) * o.softcap;

  Band band = make_band(a, s, selected);
  w.minus_distance = band.minus_distance;
  Tensor logits = w.capped;
  if (is_defined(o.alibi_slopes)) logits = logits + band.minus_distance * per_head(*o.alibi_slopes, w, o);
  if (is_defined(o.attn_mask)) {
    if (o.attn_mask->scalar_type() == at::kBool)
      band.allowed = band.allowed.defined() ? band.allowed.logical_and(*o.attn_mask) : *o.attn_mask;
    else
      logits = logits + o.attn_mask->to(accumulator);
  }
  const auto minus_infinity = at::scalar_tensor(-kInfinity, logits.options());
  if (band.allowed.defined()) logits = at::where(band.allowed, logits, minus_infinity);
  w.scores = logits;
  if (is_defined(o.sinks)) {
    Tensor sinks = per_head(*o.sinks, w, o).expand_symint({s.batch, s.heads, s.query_length, 1});
    if (is_defined(o.cu_seqlens_q)) {  // the rows after the last sequence have none
      const Tensor sequence = sequence_of_row(*o.cu_seqlens_q, s.query_length);
      sinks = at::where((sequence < c10::Scalar(s.entries)).unsqueeze(-1), sinks, minus_infinity);
    }
    logits = at::cat({logits, sinks}, -1);
  }

  // A softmax over nothing but -inf is NaN, and so are its derivatives: put 0 in such rows before, the results after.
  w.is_empty = (logits == -kInfinity).all(-1, /*keepdim=*/true);
  w.logits = logits = logits.masked_fill(w.is_empty, 0);
  w.logsumexp = at::logsumexp(logits, {-1}, /*keepdim=*/true).masked_fill(w.is_empty, -kInfinity);
  w.weights = at::softmax(logits, -1).masked_fill(w.is_empty, 0);
  if (is_defined(o.sinks)) {
    w.sink_weights = w.weights.narrow_symint(-1, s.key_length, 1);
    w.weights = w.weights.narrow_symint(-1, 0, s.key_length);
  }
  if (o.dropout_p > 0) w.kept = kept_weights(a, s, rng_state).to(accumulator) * Dropout::keep_scale(o.dropout_p);
  return w;
}

Tensor by_row(const Tensor& t, at::ScalarType type) { return t.to(type).transpose(1, 2).contiguous().transpose(1, 2); }

Tensor sum_to(const Tensor& t, const Tensor& like) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < 4; ++dim)
    if (TORCH_GUARD_OR_FALSE(like.sym_size(dim).sym_eq(1))) dims.push_back(dim);
  return (dims.empty() ? t : t.sum(dims, /*keepdim=*/true)).to(like.scalar_type());
}

}  // namespace torch_attn::ops::composite
