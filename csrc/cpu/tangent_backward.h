// The backward pass's tangents (forward-mode derivatives), from which its own backward is made as well: backward's
// walk, with each product replaced by the two of the product rule. Nothing of backward itself is written. Included by
// instantiate/*.cpp.
#pragma once

#include "backward_tasks.h"
#include "tangent_gradient_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// One task's memory, and its walk over the keys with one block of rows after the other; see VectorWalk.
template <class RealType>
struct TangentWalk {
  using Real = RealType;
  using Block = TangentRowBlock<Real>;
  using Tensors = TangentCall;
  using Wanted = typename TangentGradientTile<Real>::Wanted;
  static constexpr int64_t kColumns = kLanes<Real>;
  static constexpr int64_t kExtraKeys = 0;
  static int64_t block_rows(const AttentionProblem& p) { return balanced_block<Real>(p.query_length, kBackwardRows); }

  const BackwardPlan& b;
  const AttentionProblem& p;
  const TangentCall& t;
  int64_t batch, kv_head;
  Real *key_sums, *value_sums;
  TangentGradientTile<Real> gradient_tile;
  typename TangentKeys<Real>::Memory key_memory;
  TangentTile<Real> tile;  // panels: [lane offset · kBackwardKeys][key][lane]
  Real *grad_query, *grad_query_rows, *ones;

  TangentWalk(const AttentionProblem& problem, const TangentCall& call, const BackwardPlan& plan, int64_t batch_index,
              int64_t kv_head_index, Real* key_gradient, Real* value_gradient, Scratch& scratch)
      : b(plan),
        p(problem),
        t(call),
        batch(batch_index),
        kv_head(kv_head_index),
        key_sums(key_gradient),
        value_sums(value_gradient),
        gradient_tile(problem, call, scratch),
        key_memory(problem, kBackwardKeys, scratch),
        tile(TangentTile<Real>::take(b.block_rows * kBackwardKeys, scratch)) {
    grad_query = scratch.take<Real>(b.block_rows * p.head_dim);
    grad_query_rows = scratch.take<Real>(kMaxVectors * kLanes<Real> * round_up(p.head_dim, kLanes<Real>));
    ones = scratch.take<Real>(kMaxVectors * kLanes<Real>);
    fill<Real>(ones, 1, kMaxVectors * kLanes<Real>);
  }

  // Returns the block's share of the tangent of the ALiBi slope's gradient.
  Real over_keys(Block& block) {
    const ScoreStage<Real> stage(p, batch, block.head);
    block.normalise_weights(p, stage, gradient_tile.scratch, tile.weights, key_memory.key);
    if (b.needs_query) fill<Real>(grad_query, 0, block.panels.lanes * p.head_dim);
    Real slope_gradient = 0;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, range.end - key);
      const auto key_block =
          TangentKeys<Real>::read(p, t.tangents, batch, kv_head, key, keys, block.rows <= kFewRows, key_memory);
      int64_t begin[Panels::kMax], end[Panels::kMax];
      for (int i = 0; i < block.panels.count; ++i) {
        with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
          const KeySpan span =
              attend<kVectors>(block, stage, block.panels.offset[i], key, keys, key_block, slope_gradient);
          begin[i] = span.begin, end[i] = span.end;
        });
      }
      const auto accumulate = [&](const Real* tiles, Rows<Real> rows, Real* sums, int64_t columns, int64_t stride) {
        accumulate_gradient<Real>(block.panels, begin, end, keys, columns, {tiles, kBackwardKeys}, block.rows,
                                  rows.data, rows.stride, sums + key * stride, stride);
      };
      const auto to_key = [&](const Real* tiles, Rows<Real> rows) {
        accumulate(tiles, rows, key_sums, b.key_columns, b.key_stride);
      };
      const auto to_value = [&](const Real* tiles, Rows<Real> rows) {
        accumulate(tiles, rows, value_sums, b.value_columns, b.value_stride);
      };
      const bool has_grad = block.tangent_grad_rows.data != nullptr,
                 has_query = block.tangent_query_rows.data != nullptr;
      if (b.needs_value && t.changes.weights) to_value(tile.tangent_weights, block.grad_rows);
      if (b.needs_value && has_grad) to_value(tile.weights, block.tangent_grad_rows);
      if (b.needs_key) to_key(tile.tangent_gradients, block.query_rows);
      if (b.needs_key && has_query) to_key(tile.gradients, block.tangent_query_rows);
    }
    if (b.needs_query) store_grad_query(block);
    return slope_gradient;
  }

  // One panel's weights and gradients with one block of keys, and its grad_query. Returns the keys that it filled in.
  template <int kVectors>
  TA_NOINLINE KeySpan attend(const Block& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                             int64_t keys, const TangentKeys<Real>& key_block, Real& slope_gradient) {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const TangentTile<Real> panel = tile.at(offset * kBackwardKeys);
    const KeySpan span =
        KeySpan::of(stage.band, block.row + offset, smaller(width, block.rows - offset), key, keys, kGradientRows);
    if (span.empty()) return span;
    const Wanted wanted = b.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly;
    if (!gradient_tile.template compute<kVectors>(block, stage, offset, key, span, key_block, wanted, panel,
                                                  b.needs_slopes ? &slope_gradient : nullptr)) {
      for (Real* part : {panel.weights, panel.tangent_weights, panel.gradients, panel.tangent_gradients}) {
        fill<Real>(part + span.begin * width, 0, (span.end - span.begin) * width);
      }
      return span;
    }
    const auto combine = [&](Rows<Real> rows, const Real* gradients) TA_INLINE_LAMBDA {
      combine_rows<Real, kVectors, false>(p.head_dim, span.end - span.begin, rows.data + span.begin * rows.stride,
                                          rows.stride, gradients + span.begin * width, grad_query + offset * p.head_dim,
                                          nullptr);
    };
    if (b.needs_query) combine(key_block.key, panel.tangent_gradients);
    if (b.needs_query && key_block.tangent_key.data != nullptr) combine(key_block.tangent_key, panel.gradients);
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

// The tangents of the scores' gradient, for MaskGradient.
template <class RealType>
struct TangentScores {
  using Real = RealType;
  using Block = TangentRowBlock<Real>;
  using Tensors = TangentCall;

  const AttentionProblem& p;
  const TangentCall& t;
  TangentGradientTile<Real> gradient_tile;
  typename TangentKeys<Real>::Memory key_memory;
  TangentTile<Real> tile;
  TangentKeys<Real> key_block;

  TangentScores(const AttentionProblem& problem, const TangentCall& call, Scratch& scratch)
      : p(problem),
        t(call),
        gradient_tile(problem, call, scratch),
        key_memory(problem, kBackwardKeys, scratch),
        tile(TangentTile<Real>::take(kBackwardKeys * kMaxVectors * kLanes<Real>, scratch)) {}

  void start(Block& block, const ScoreStage<Real>& stage) const {
    block.normalise_weights(p, stage, gradient_tile.scratch, tile.weights, key_memory.key);
  }

  void load_keys(const Block& block, int64_t key, int64_t keys) {
    key_block = TangentKeys<Real>::read(p, t.tangents, block.batch, block.head / (p.heads / p.kv_heads), key, keys,
                                        block.rows <= kFewRows, key_memory);
  }

  template <int kVectors>
  TA_INLINE const Real* score_gradients(const Block& block, const ScoreStage<Real>& stage, int64_t key,
                                        const KeySpan& span) const {
    const bool any = gradient_tile.template compute<kVectors>(
        block, stage, 0, key, span, key_block, TangentGradientTile<Real>::Wanted::kScoreGradients, tile, nullptr);
    return any ? tile.tangent_gradients : nullptr;
  }
};

template <class Real>
void tangent_backward_as(const AttentionProblem& problem, const Tangents& tangents,
                         const TangentBackwardTensors& tensors, const Parallel& parallel) {
  const TangentCall call(problem, tangents, tensors);
  if (tensors.grad_attn_mask.defined()) mask_gradient<TangentScores<Real>>(problem, call, parallel);
  backward_with<TangentWalk<Real>>(problem, call, parallel);
}

inline void attention_tangent_backward(const AttentionProblem& problem, const Tangents& tangents,
                                       const TangentBackwardTensors& tensors, const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    tangent_backward_as<double>(problem, tangents, tensors, parallel);
  } else {
    tangent_backward_as<float>(problem, tangents, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
