// The inner part of the backward pass: one block of query rows meets one block of keys after the other. Included by
// backward.h.
#pragma once

#include "gradient_tile.h"
#include "row_product.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A block's rows are added up in registers, one after the other. On AVX-512 192 rows are 1 to 5 % faster, but the
// longer sums raise the error of value's gradient by a fifth (a causal mask, L 128 and 512).
constexpr int64_t kBackwardRows = 96;

class AttendedBits;

// What a backward call computes, and how it is cut up; the same for all of its tasks.
struct BackwardPlan {
  mutable bool infinite = false;  // see bfloat16/operands.h: set by the walks that cannot serve such numbers
  bool needs_query, needs_key, needs_value, needs_slopes;
  bool needs_scores;                   // any but value
  int64_t block_rows, row_blocks;      // query rows per block, blocks per head
  int64_t key_columns, value_columns;  // row lengths of the sums for grad_key and grad_value; 0 if not needed
  int64_t key_stride, value_stride;    // from row to row of these sums
  const AttendedBits* attended;        // of walks that read a shared mask so, see bfloat16/attended_bits.h
};

// One task's memory, and its walk over the keys with one block of rows after the other. Tile computes the gradients of
// one tile of scores: GradientTile, or what has its interface.
template <class Tile>
struct VectorWalk {
  using Real = typename Tile::Real;
  using Block = typename Tile::Block;
  using Tensors = typename Tile::Tensors;
  using Wanted = typename Tile::Wanted;
  static constexpr int64_t kColumns = kLanes<Real>;  // the sums' row lengths are a multiple of this
  static constexpr int64_t kExtraKeys = 0;           // rows that a walk may touch after the sums' last key
  static int64_t block_rows(const AttentionProblem& p) { return balanced_block<Real>(p.query_length, kBackwardRows); }

  const BackwardPlan& b;
  const AttentionProblem& p;
  const Tensors& t;
  int64_t batch, kv_head;
  Real *key_sums, *value_sums;
  bool at_once;  // one block of keys is all: each panel's grad_query is complete, and stored, after its only tile
  Tile tile;
  Real *weights, *gradients;  // panels: [lane offset · kBackwardKeys][key][lane]
  Real *grad_query, *grad_query_rows, *ones;
  Real *key_scratch, *value_scratch;

  VectorWalk(const AttentionProblem& problem, const Tensors& tensors, const BackwardPlan& plan, int64_t batch_index,
             int64_t kv_head_index, Real* key_gradient, Real* value_gradient, Scratch& scratch)
      : b(plan),
        p(problem),
        t(tensors),
        batch(batch_index),
        kv_head(kv_head_index),
        key_sums(key_gradient),
        value_sums(value_gradient),
        tile(p, t, scratch) {
    const int64_t lanes = b.block_rows;
    weights = scratch.take<Real>(lanes * kBackwardKeys);
    gradients = scratch.take<Real>(lanes * kBackwardKeys);
    grad_query = scratch.take<Real>(lanes * p.head_dim);
    grad_query_rows = scratch.take<Real>(kMaxVectors * kLanes<Real> * round_up(p.head_dim, kLanes<Real>));
    ones = scratch.take<Real>(kMaxVectors * kLanes<Real>);
    fill<Real>(ones, 1, kMaxVectors * kLanes<Real>);
    key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
    value_scratch = scratch.take<Real>(kBackwardKeys * p.value_dim);
  }

  // Returns the block's share of the ALiBi slope's gradient.
  Real over_keys(Block& block) {
    ScoreStage<Real> stage(p, batch, block.head);
    block.normalise_weights(p, stage, tile.scratch, weights, key_scratch);
    if constexpr (Tile::kTakesRawDots) stage.leave_dots_raw();
    Real slope_gradient = 0;
    const bool few_queries = block.rows <= kFewRows;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    at_once = !range.empty() && range.end - range.begin <= kBackwardKeys && has_row_product<Real>(p.head_dim);
    if (b.needs_query && !at_once) fill<Real>(grad_query, 0, block.panels.lanes * p.head_dim);
    for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, range.end - key);
      const Rows<Real> key_rows =
          key_value_rows(p.key, batch, kv_head, key, keys, p.head_dim, few_queries, key_scratch);
      const Rows<Real> value_rows =
          key_value_rows(p.value, batch, kv_head, key, keys, p.value_dim, few_queries, value_scratch);
      const NextRows next(p, batch, kv_head, key + keys, kBackwardKeys, range.end - key - keys, block.panels.count);
      int64_t begin[Panels::kMax], end[Panels::kMax];
      for (int i = 0; i < block.panels.count; ++i) {
        next.prefetch(i);
        with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
          const KeySpan span =
              attend<kVectors>(block, stage, block.panels.offset[i], key, keys, key_rows, value_rows, slope_gradient);
          begin[i] = span.begin, end[i] = span.end;
        });
        const int then = block.panels.after(i);
        const int64_t offset = block.panels.offset[then], width = block.panels.vectors[then] * kLanes<Real>;
        RowsAhead ahead;
        add_bias(stage.mask_rows, block.row + offset, smaller(width, block.rows - offset), then > 0 ? key : key + keys,
                 kBackwardKeys, ahead);
        ahead.ask_for_rest();
      }
      if (b.needs_value) {
        accumulate_gradient<Real>(block.panels, begin, end, keys, b.value_columns, {weights, kBackwardKeys}, block.rows,
                                  block.grad_rows.data, block.grad_rows.stride, value_sums + key * b.value_stride,
                                  b.value_stride);
      }
      if (b.needs_key) {
        accumulate_gradient<Real>(block.panels, begin, end, keys, b.key_columns, {gradients, kBackwardKeys}, block.rows,
                                  block.query_rows.data, block.query_rows.stride, key_sums + key * b.key_stride,
                                  b.key_stride);
      }
    }
    if (b.needs_query && !at_once) store_grad_query(block);
    return slope_gradient;
  }

  // One panel's weights and gradients with one block of keys, and its grad_query. Returns the keys that it filled in.
  template <int kVectors>
  TA_NOINLINE KeySpan attend(const Block& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                             int64_t keys, Rows<Real> key_rows, Rows<Real> value_rows, Real& slope_gradient) {
    constexpr int64_t width = kVectors * kLanes<Real>;
    Real *panel_weights = weights + offset * kBackwardKeys, *panel_gradients = gradients + offset * kBackwardKeys;
    const KeySpan span =
        KeySpan::of(stage.band, block.row + offset, smaller(width, block.rows - offset), key, keys, kGradientRows);
    const auto store_query = [&](int64_t count) {  // from the gradients of so many keys
      store_row_product<Real>(t.grad_query, batch, block.head, block.row + offset, smaller(width, block.rows - offset),
                              p.head_dim, count, panel_gradients + span.begin * width, width,
                              {key_rows.data + span.begin * key_rows.stride, key_rows.stride}, nullptr,
                              grad_query_rows);
    };
    if (span.empty()) {
      if (b.needs_query && at_once) store_query(0);
      return span;
    }
    const Wanted wanted = b.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly;
    if (!tile.template compute<kVectors>(block, stage, offset, key, span, key_rows, value_rows, wanted, panel_weights,
                                         panel_gradients, b.needs_slopes ? &slope_gradient : nullptr)) {
      fill<Real>(panel_weights + span.begin * width, 0, (span.end - span.begin) * width);
      fill<Real>(panel_gradients + span.begin * width, 0, (span.end - span.begin) * width);
      if (b.needs_query && at_once) store_query(0);
      return span;
    }
    if (b.needs_query && at_once) {
      store_query(span.end - span.begin);
    } else if (b.needs_query) {
      combine_rows<Real, kVectors, false>(
          p.head_dim, span.end - span.begin, key_rows.data + span.begin * key_rows.stride, key_rows.stride,
          panel_gradients + span.begin * width, grad_query + offset * p.head_dim, nullptr);
    }
    return span;
  }

  void store_grad_query(const Block& block) {
    for (int i = 0; i < block.panels.count; ++i) {
      const int64_t offset = block.panels.offset[i], width = block.panels.vectors[i] * kLanes<Real>;
      store_panel(t.grad_query, batch, block.head, block.row + offset, smaller(width, block.rows - offset), p.head_dim,
                  grad_query + offset * p.head_dim, width, ones, grad_query_rows);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
