// The query side of the backward pass: one block of rows of one head, in the layouts that the products read. Included
// by backward.h, mask_gradient.h and tangent_forward.h.
#pragma once

#include "../core/online_softmax.h"
#include "dropout_tile.h"
#include "score_tile.h"
#include "scratch.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kBackwardKeys = 96;  // keys per block
constexpr int64_t kFewRows = 16;       // see key_value_rows

// One tile's working memory: a panel with a block of keys, each array [key][lane] but dropout's.
template <class Real>
struct TileScratch {
  uint32_t* dropout = nullptr;  // of KeptTile
  Real *bias = nullptr, *staging = nullptr, *derivative = nullptr;

  TileScratch(const AttentionProblem& p, Scratch& scratch) {
    constexpr int64_t size = kBackwardKeys * kMaxVectors * kLanes<Real>;
    if (p.dropout_p > 0) {
      dropout = scratch.take<uint32_t>(dropout_words(kBackwardKeys, kDropoutRows<Real, kMaxVectors>));
    }
    if (p.softcap != 0) derivative = scratch.take<Real>(size);
    if (p.attn_mask.defined()) {
      bias = scratch.take<Real>(size);
      staging = scratch.take<Real>(size);
    }
  }
};

// The dropout of a panel that starts at row with the block's keys of span, in words.
template <class Real, int kVectors>
TA_INLINE KeptTile<Real, kVectors> kept_tile(const AttentionProblem& p, const Dropout& dropout, int64_t batch,
                                             int64_t head, int64_t row, int64_t key, const KeySpan& span,
                                             uint32_t* words) {
  if (p.dropout_p == 0) return {};
  return dropout_tile<Real, kVectors>(dropout, p.dropout_batch_head(batch, head), row, key + span.begin,
                                      span.end - span.begin, key, static_cast<Real>(Dropout::keep_scale(p.dropout_p)),
                                      words);
}

// The bias tile for a panel that starts at row with the block's keys of span; false if it masks all of them.
template <class Real, int kVectors>
TA_INLINE bool load_bias(const ScoreStage<Real>& stage, const TileScratch<Real>& tile, int64_t row, int64_t rows,
                         int64_t key, const KeySpan& span, BiasTile<Real>& bias) {
  if (!stage.mask) return true;
  if (stage.mask_is_per_key()) return load_bias_per_key(stage.mask_rows, key, span.end, tile.bias, bias);
  return load_bias_per_lane(stage.mask_rows, row, rows, kVectors * kLanes<Real>, key, span.begin, span.end,
                            tile.staging, tile.bias, bias);
}

// exp of a score minus its row's logsumexp. Where a large logsumexp has been rounded (see RowBlock::normalise_weights)
// the difference may come out positive: there the result is at most 1.
template <class Real>
TA_INLINE Vec<Real> weight_from_exponent(Vec<Real> exponent, bool bounded) {
  if (bounded) exponent = exponent > splat(Real{0}) ? splat(Real{0}) : exponent;
  return VectorMath<Real>::exp(exponent);
}

// delta = rowsum(grad_out · out) − grad_logsumexp, for rows [row, row + rows) of one head. Rows with nothing to attend
// (logsumexp −∞) and the lanes beyond the last row get logsumexp +∞, so that every weight is 0, and delta 0; a true +∞
// becomes NaN. grad_row(i) gives row i of grad_out in whole vectors; out_memory holds one row.
template <class Real, class GradRow>
TA_INLINE void load_logsumexp_and_delta(const AttentionProblem& p, const BackwardTensors& t, int64_t batch,
                                        int64_t head, int64_t row, int64_t rows, int64_t lanes, const GradRow& grad_row,
                                        Real* out_memory, Real* logsumexp, Real* delta) {
  constexpr Real infinity = static_cast<Real>(__builtin_inf());
  const int64_t first = p.first_row(batch, head) + row;
  const int64_t columns = round_up(p.value_dim, kLanes<Real>);
  const Real* stored = static_cast<const Real*>(t.logsumexp) + first;
  const Real* grad_logsumexp =
      t.grad_logsumexp == nullptr ? nullptr : static_cast<const Real*>(t.grad_logsumexp) + first;
  for (int64_t i = 0; i < lanes; ++i) {
    logsumexp[i] = infinity;
    delta[i] = 0;
    if (i >= rows || stored[i] == -infinity) continue;
    logsumexp[i] = stored[i] == infinity ? static_cast<Real>(__builtin_nan("")) : stored[i];
    const Real* grad = grad_row(i);
    const Real* out = padded_rows(t.out, batch, head, row + i, 1, p.value_dim, out_memory).data;
    Vec<Real> sum{};
    for (int64_t j = 0; j < columns; j += kLanes<Real>) sum += load(grad + j) * load(out + j);
    delta[i] = sum_of_lanes<Real>(sum) - (grad_logsumexp == nullptr ? Real{0} : grad_logsumexp[i]);
  }
}

// A logsumexp whose rounding would scale its row's weights visibly.
template <class Real>
TA_INLINE bool is_large_logsumexp(Real x) {
  const Real magnitude = x < 0 ? -x : x;
  return magnitude > static_cast<Real>(kLargeLogsumexp) && magnitude < static_cast<Real>(__builtin_inf());
}

template <class Real>
struct RowBlock {
  int64_t batch, head, row, rows;
  Panels panels;
  Rows<Real> query_rows, grad_rows;  // of whole vectors, padded with zeros
  Real *query, *grad_out;            // panels: [lane offset · dim][dim][lane]
  Real *logsumexp, *delta;           // [lane]
  Real* weight_scale;                // [lane], or null where all are 1

  // Memory for any block of at most max_rows rows.
  RowBlock(const AttentionProblem& p, int64_t max_rows, Scratch& scratch) {
    const int64_t lanes = round_up(max_rows, kLanes<Real>);
    query_memory_ = scratch.take<Real>(lanes * round_up(p.head_dim, kLanes<Real>));
    grad_memory_ = scratch.take<Real>(lanes * round_up(p.value_dim, kLanes<Real>));
    query = scratch.take<Real>(lanes * p.head_dim);
    grad_out = scratch.take<Real>(lanes * p.value_dim);
    logsumexp = scratch.take<Real>(lanes);
    delta = scratch.take<Real>(lanes);
    weight_scale_memory_ = scratch.take<Real>(lanes);
    out_memory_ = scratch.take<Real>(round_up(p.value_dim, kLanes<Real>));
  }

  void read(const AttentionProblem& p, const BackwardTensors& t, int64_t new_batch, int64_t new_head, int64_t first_row,
            int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    panels.cut(rows, kLanes<Real>);
    query_rows = rows_of(p.query, p.head_dim, query_memory_);
    grad_rows = rows_of(t.grad_out, p.value_dim, grad_memory_);
    const auto grad_row = [&](int64_t i) { return grad_rows.data + i * grad_rows.stride; };
    load_logsumexp_and_delta(p, t, batch, head, row, rows, panels.lanes, grad_row, out_memory_, logsumexp, delta);
    for (int i = 0; i < panels.count; ++i) {
      const int64_t offset = panels.offset[i], width = panels.vectors[i] * kLanes<Real>;
      pack_panel(query + offset * p.head_dim, width, query_rows.data + offset * query_rows.stride, query_rows.stride,
                 rows - offset, p.head_dim);
      pack_panel(grad_out + offset * p.value_dim, width, grad_rows.data + offset * grad_rows.stride, grad_rows.stride,
                 rows - offset, p.value_dim);
    }
  }

  // Where a large logsumexp has lost the weights' common factor to rounding (core/online_softmax.h), sums them once
  // more.
  void normalise_weights(const AttentionProblem& p, const ScoreStage<Real>& stage, const TileScratch<Real>& tile,
                         Real* scores, Real* key_scratch) {
    weight_scale = nullptr;
    bool any = false;
    for (int64_t i = 0; i < rows; ++i) any = any || is_large_logsumexp(logsumexp[i]);
    if (!any) return;
    weight_scale = weight_scale_memory_;
    fill<Real>(weight_scale, 0, panels.lanes);
    const KeyRange range = stage.band.keys_of_any(row, row + rows);
    for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, range.end - key);
      const Rows<Real> key_rows = key_value_rows(p.key, batch, head / (p.heads / p.kv_heads), key, keys, p.head_dim,
                                                 rows <= kFewRows, key_scratch);
      for (int i = 0; i < panels.count; ++i) {
        with_vectors(panels.vectors[i], [&]<int kVectors>() {
          add_weights<kVectors>(p, stage, tile, panels.offset[i], key, keys, key_rows, scores);
        });
      }
    }
    for (int64_t i = 0; i < panels.lanes; ++i) {
      if (i >= rows || !is_large_logsumexp(logsumexp[i])) {
        weight_scale[i] = 1;
        continue;
      }
      if (p.sinks.defined()) {
        const Real sink = head_number<Real>(p.sinks, batch, head);
        weight_scale[i] += static_cast<Real>(__builtin_exp(static_cast<double>(sink - logsumexp[i])));
      }
      weight_scale[i] = weight_scale[i] > 0 ? 1 / weight_scale[i] : weight_scale[i];
    }
  }

 protected:
  // Rows far apart are copied: see key_value_rows.
  Rows<Real> rows_of(const TensorView& view, int64_t columns, Real* memory) const {
    if (view.stride[2] == columns) return padded_rows(view, batch, head, row, rows, columns, memory);
    const int64_t stride = round_up(columns, kLanes<Real>);
    load_rows(memory, stride, view, element(view, batch, head, row), rows, columns);
    return {memory, stride};
  }

  Real* out_memory_;  // one row

 private:
  // weight_scale[lane] += Σ_key exp(score − logsumexp) over one block of keys.
  template <int kVectors>
  TA_NOINLINE void add_weights(const AttentionProblem& p, const ScoreStage<Real>& stage, const TileScratch<Real>& tile,
                               int64_t offset, int64_t key, int64_t keys, Rows<Real> key_rows, Real* scores) {
    constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
    const KeySpan span =
        KeySpan::of(stage.band, row + offset, smaller<int64_t>(width, rows - offset), key, keys, kTileRows<kVectors>);
    BiasTile<Real> bias;
    if (span.empty()) return;
    if (!load_bias<Real, kVectors>(stage, tile, row + offset, smaller<int64_t>(width, rows - offset), key, span, bias))
      return;
    score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, query + offset * p.head_dim,
                                      row + offset, key, scores, nullptr, nullptr);
    for (int n = 0; n < kVectors; ++n) {
      const int64_t lane = offset + n * n_lanes;
      Vec<Real> sum{};
      for (int64_t j = span.begin; j < span.end; ++j) {
        sum += weight_from_exponent<Real>(load(scores + j * width + n * n_lanes) - load(logsumexp + lane), true);
      }
      store(weight_scale + lane, load(weight_scale + lane) + sum);
    }
  }

  Real *weight_scale_memory_, *query_memory_, *grad_memory_;
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
