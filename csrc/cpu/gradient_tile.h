// The elementwise stage of the backward pass: one tile of weights and of the scores' gradient. Included by backward.h
// and mask_gradient.h.
#pragma once

#include "row_block.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// In: weights holds s, the scores divided by score_factor, gradients holds g = grad_out·value. Out: the weights after
// dropout, and the gradient
//   P · (keep · g − delta) · derivative · factor,  P = exp(s · score_factor − logsumexp) · weight_scale,
// where keep is dropout's scale or 0. dropout.words, derivative and weight_scale are null where they are 1; kPlain says
// that all are.
template <class Real, int kVectors, bool kPlain>
TA_NOINLINE void weights_and_gradients(int64_t begin, int64_t end, Real score_factor, Real* weights, Real* gradients,
                                       const Real* logsumexp, const Real* delta, Real factor, const Real* weight_scale,
                                       KeptTile<Real, kVectors> dropout, const Real* derivative) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> row_logsumexp[kVectors], row_delta[kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    row_logsumexp[n] = load(logsumexp + n * n_lanes);
    row_delta[n] = load(delta + n * n_lanes);
  }
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int64_t place = j * width + n * n_lanes;
      const Vec<Real> exponent = load(weights + place) * score_factor - row_logsumexp[n];
      Vec<Real> gradient = load(gradients + place);
      if constexpr (kPlain) {
        const Vec<Real> weight = Math::exp(exponent);
        store(weights + place, weight);
        store(gradients + place, weight * (gradient - row_delta[n]) * factor);
        continue;
      }
      Vec<Real> weight = weight_from_exponent<Real>(exponent, weight_scale != nullptr);
      if (weight_scale != nullptr) weight *= load(weight_scale + n * n_lanes);
      Vec<Real> kept = weight;
      if (dropout.words != nullptr) {
        const Kept<Real> lanes = dropout.at(j, n);
        kept = kept_of(kept, lanes, dropout.scale);
        gradient = kept_of(gradient, lanes, dropout.scale);
      }
      store(weights + place, kept);
      gradient = weight * (gradient - row_delta[n]) * factor;
      store(gradients + place, derivative == nullptr ? gradient : gradient * load(derivative + place));
    }
  }
}

// The factor and derivative that lead from the scores' gradient to the dots'.
template <class Real>
struct Chain {
  Real factor = 1;
  const Real* derivative = nullptr;
};

// Multiplies a tile of score gradients by chain, and returns their sum weighted by d score / d ALiBi slope.
template <class Real, int kVectors>
TA_NOINLINE Real sum_slope_gradient(const ScoreStage<Real>& stage, int64_t row, int64_t key, int64_t begin, int64_t end,
                                    Real* gradients, Chain<Real> chain) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> sum{};
  for (int n = 0; n < kVectors; ++n) {
    Vec<Real> position{};
    for (int i = 0; i < n_lanes; ++i) position[i] = static_cast<Real>(stage.band.position(row + n * n_lanes + i) - key);
    for (int64_t j = begin; j < end; ++j) {
      Real* place = gradients + j * width + n * n_lanes;
      const Vec<Real> gradient = load(place);
      sum += gradient * ScoreMod<Math>::alibi_derivative(splat(static_cast<Real>(j)) - position);
      const Vec<Real> chained = gradient * chain.factor;
      store(place, chain.derivative == nullptr ? chained : chained * load(chain.derivative + j * width + n * n_lanes));
    }
  }
  return sum_of_lanes<Real>(sum);
}

// Weights and score gradients of one panel with one block of keys.
template <class RealType>
struct GradientTile {
  using Real = RealType;
  using Block = RowBlock<Real>;
  using Tensors = BackwardTensors;
  static constexpr bool kTakesRawDots = true;  // see ScoreStage::leave_dots_raw

  const AttentionProblem& p;
  Dropout dropout;
  TileScratch<Real> scratch;

  GradientTile(const AttentionProblem& problem, const BackwardTensors&, Scratch& memory)
      : p(problem),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)),
        scratch(problem, memory) {}

  enum class Wanted {
    kScoreGradients,  // d loss / d score
    kDotGradients,    // d loss / d (q·k)
    kWeightsOnly,
  };

  // For the panel at lane offset and the keys of span. False where nothing is attended: then nothing is written.
  // slope_gradient, if wanted, is added to.
  template <int kVectors>
  TA_INLINE bool compute(const RowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                         const KeySpan& span, Rows<Real> key_rows, Rows<Real> value_rows, Wanted wanted, Real* weights,
                         Real* gradients, Real* slope_gradient) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, scratch, row, smaller(width, block.rows - offset), key, span, bias))
      return false;
    score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                      key, weights, scratch.derivative, nullptr);
    if (wanted != Wanted::kWeightsOnly) {
      dot_rows<Real, kVectors, false>(span.begin, span.end, p.value_dim, value_rows.data, value_rows.stride,
                                      block.grad_out + offset * p.value_dim, ScaledDots<Real>{1}, gradients, nullptr);
    }
    finish<kVectors>(block, stage, offset, key, span, stage.score_factor(), wanted, weights, gradients, slope_gradient);
    return true;
  }

  // The elementwise part: weights holds the scores divided by score_factor, gradients holds grad_out·value.
  template <int kVectors, class AnyBlock>
  TA_INLINE void finish(const AnyBlock& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                        const KeySpan& span, Real score_factor, Wanted wanted, Real* weights, Real* gradients,
                        Real* slope_gradient) const {
    const int64_t row = block.row + offset;
    const auto kept = kept_tile<Real, kVectors>(p, dropout, block.batch, block.head, row, key, span, scratch.dropout);
    const Real* weight_scale = block.weight_scale == nullptr ? nullptr : block.weight_scale + offset;
    const Chain<Real> chain =
        stage.softcap ? Chain<Real>{1, scratch.derivative} : Chain<Real>{stage.mod.scale, nullptr};
    const Chain<Real> now = wanted == Wanted::kDotGradients && slope_gradient == nullptr ? chain : Chain<Real>{};
    const bool plain = weight_scale == nullptr && kept.words == nullptr && now.derivative == nullptr;
    (plain ? weights_and_gradients<Real, kVectors, true>
           : weights_and_gradients<Real, kVectors, false>)(span.begin, span.end, score_factor, weights, gradients,
                                                           block.logsumexp + offset, block.delta + offset, now.factor,
                                                           weight_scale, kept, now.derivative);
    if (slope_gradient != nullptr) {
      *slope_gradient += sum_slope_gradient<Real, kVectors>(stage, row, key, span.begin, span.end, gradients, chain);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
