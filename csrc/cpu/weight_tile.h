// One tile of attention weights, recomputed from logsumexp: what the kernels of attention maps start from. Included by
// map_weights.h, map_statistics.h and map_backward.h.
#pragma once

#include "row_block.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Scores become weights, in place. weight_scale is null where it is 1.
template <class Real, int kVectors>
TA_NOINLINE void scores_to_weights(int64_t begin, int64_t end, Real* scores, const Real* logsumexp,
                                   const Real* weight_scale) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> row_logsumexp[kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) row_logsumexp[n] = load(logsumexp + n * n_lanes);
  if (weight_scale == nullptr) {
    for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        Real* place = scores + j * width + n * n_lanes;
        store(place, Math::exp(load(place) - row_logsumexp[n]));
      }
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    for (int n = 0; n < kVectors; ++n) {
      Real* place = scores + j * width + n * n_lanes;
      const Vec<Real> weight = weight_from_exponent<Real>(load(place) - row_logsumexp[n], true);
      store(place, weight * load(weight_scale + n * n_lanes));
    }
  }
}

template <class Real>
struct WeightTile {
  const AttentionProblem& p;
  TileScratch<Real> scratch;

  WeightTile(const AttentionProblem& problem, Scratch& memory) : p(problem), scratch(problem, memory) {}

  // The weights [key][lane] of the panel at lane offset with the keys of span, at most kBackwardKeys. False where
  // nothing is attended: then nothing is written.
  template <int kVectors>
  TA_INLINE bool compute(const RowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                         const KeySpan& span, Rows<Real> key_rows, Real* weights) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, scratch, row, smaller(width, block.rows - offset), key, span, bias))
      return false;
    score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                      key, weights, nullptr, nullptr);
    scores_to_weights<Real, kVectors>(span.begin, span.end, weights, block.logsumexp + offset,
                                      block.weight_scale == nullptr ? nullptr : block.weight_scale + offset);
    return true;
  }
};

// The keys of one block, converted where that is needed.
template <class Real>
TA_INLINE Rows<Real> key_rows_of(const AttentionProblem& p, const RowBlock<Real>& block, int64_t key, int64_t keys,
                                 Real* scratch) {
  return key_value_rows(p.key, block.batch, block.head / (p.heads / p.kv_heads), key, keys, p.head_dim,
                        block.rows <= kFewRows, scratch);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
