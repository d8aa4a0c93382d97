// The elementwise stage of hard attention's backward pass, in the place of gradient_tile.h: what log-probabilities and
// entropy pass back to one tile of scores. Included by instantiate/selection.h.
#pragma once

#include "../core/selection.h"
#include "gradient_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Real>
struct SelectionBlock : RowBlock<Real> {
  Real* log_weight_gradient;    // [lane]
  const int64_t* indices;       // [row][count], of the block's rows
  const Real* chosen_gradient;  // the same; null: zero
  int64_t count;

  SelectionBlock(const AttentionProblem& p, int64_t max_rows, Scratch& scratch)
      : RowBlock<Real>(p, max_rows, scratch),
        log_weight_gradient(scratch.take<Real>(round_up(max_rows, kLanes<Real>))) {}

  void read(const AttentionProblem& p, const SelectionBackwardTensors& t, int64_t batch, int64_t head, int64_t row,
            int64_t rows) {
    RowBlock<Real>::read(p, t, batch, head, row, rows);
    const int64_t first = (batch * p.heads + head) * p.query_length + row;
    const Real* given = static_cast<const Real*>(t.log_weight_gradient);
    for (int64_t i = 0; i < this->panels.lanes; ++i) {
      const bool is_empty = i >= rows || this->logsumexp[i] == static_cast<Real>(__builtin_inf());
      log_weight_gradient[i] = given == nullptr || is_empty ? 0 : given[first + i];
    }
    count = t.count;
    indices = t.indices + first * count;
    chosen_gradient =
        t.chosen_gradient == nullptr ? nullptr : static_cast<const Real*>(t.chosen_gradient) + first * count;
  }
};

// In: scores holds s. Out: gradients holds P · (c · log P − delta) · derivative · factor, where c is
// log_weight_gradient.
template <class Real, int kVectors>
TA_NOINLINE void selection_gradients(int64_t begin, int64_t end, const Real* scores, Real* gradients,
                                     const Real* logsumexp, const Real* delta, const Real* log_weight_gradient,
                                     const Real* weight_scale, Chain<Real> chain) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  const Vec<Real> lowest = splat(2 * ExpConstants<Real>::kLowest);  // log P need not be lower where P is 0
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const int lane = n * n_lanes;
    const Vec<Real> row_logsumexp = load(logsumexp + lane), row_delta = load(delta + lane);
    const Vec<Real> coefficient = load(log_weight_gradient + lane);
    Vec<Real> scale = splat(Real{1}), log_scale{};
    if (weight_scale != nullptr) {
      scale = load(weight_scale + lane);
      log_scale = Math::log(scale);
    }
    for (int64_t j = begin; j < end; ++j) {
      const int64_t place = j * width + lane;
      Vec<Real> log_weight = load(scores + place) - row_logsumexp;
      const Vec<Real> weight = weight_from_exponent<Real>(log_weight, weight_scale != nullptr) * scale;
      log_weight = max(lowest, log_weight + log_scale);
      const Vec<Real> gradient = weight * (coefficient * log_weight - row_delta) * chain.factor;
      store(gradients + place, chain.derivative == nullptr ? gradient : gradient * load(chain.derivative + place));
    }
  }
}

// Score gradients of one panel with one block of keys; GradientTile's interface.
template <class RealType>
struct SelectionGradientTile {
  using Real = RealType;
  using Block = SelectionBlock<Real>;
  using Tensors = SelectionBackwardTensors;
  static constexpr bool kTakesRawDots = false;
  using Wanted = typename GradientTile<Real>::Wanted;

  const AttentionProblem& p;
  TileScratch<Real> scratch;

  SelectionGradientTile(const AttentionProblem& problem, const SelectionBackwardTensors&, Scratch& memory)
      : p(problem), scratch(problem, memory) {}

  template <int kVectors>
  TA_INLINE bool compute(const Block& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                         const KeySpan& span, Rows<Real> key_rows, Rows<Real>, Wanted wanted, Real* scores,
                         Real* gradients, Real* slope_gradient) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, scratch, row, smaller(width, block.rows - offset), key, span, bias))
      return false;
    score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                      key, scores, scratch.derivative, nullptr);
    const Chain<Real> chain =
        stage.softcap ? Chain<Real>{1, scratch.derivative} : Chain<Real>{stage.mod.scale, nullptr};
    const Chain<Real> now = wanted == Wanted::kDotGradients && slope_gradient == nullptr ? chain : Chain<Real>{};
    selection_gradients<Real, kVectors>(span.begin, span.end, scores, gradients, block.logsumexp + offset,
                                        block.delta + offset, block.log_weight_gradient + offset,
                                        block.weight_scale == nullptr ? nullptr : block.weight_scale + offset, now);
    if (block.chosen_gradient != nullptr) add_chosen(block, offset, width, key, span, now, gradients);
    if (slope_gradient != nullptr) {
      *slope_gradient += sum_slope_gradient<Real, kVectors>(stage, row, key, span.begin, span.end, gradients, chain);
    }
    return true;
  }

  TA_NOINLINE void add_chosen(const Block& block, int64_t offset, int64_t width, int64_t key, const KeySpan& span,
                              Chain<Real> chain, Real* gradients) const {
    const int64_t begin = key + span.begin, size = span.end - span.begin, rows = smaller(width, block.rows - offset);
    for (int64_t lane = 0; lane < rows; ++lane) {
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t choice = (offset + lane) * block.count + i, j = block.indices[choice] - begin;
        if (j < 0 || j >= size) continue;
        const int64_t place = (span.begin + j) * width + lane;
        const Real gradient = block.chosen_gradient[choice] * chain.factor;
        gradients[place] += chain.derivative == nullptr ? gradient : gradient * chain.derivative[place];
      }
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
