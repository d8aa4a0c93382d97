// What the two tangent kernels (forward-mode derivatives of forward and backward) share: a tile's scores and their
// tangents. A tangent is the derivative along one direction of all inputs; "t(x)" below is that of x. Included by
// tangent_forward.h and tangent_gradient_tile.h.
#pragma once

#include "score_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Which parts of a call's tangents are not zero.
struct TangentParts {
  bool dots;     // q·k changes
  bool scores;   // the scores change
  bool weights;  // the weights change: scores or sinks do

  explicit TangentParts(const Tangents& t)
      : dots(t.query.defined() || t.key.defined()),
        scores(dots || t.attn_mask.defined() || t.alibi_slopes.defined()),
        weights(scores || t.sinks.defined()) {}
};

// The problem with every tensor's tangent in the tensor's place, so that what reads a tensor also reads its tangent.
inline AttentionProblem problem_of_tangents(const AttentionProblem& p, const Tangents& tangents) {
  AttentionProblem result = p;
  result.query = tangents.query;
  result.key = tangents.key;
  result.value = tangents.value;
  result.attn_mask = tangents.attn_mask;
  result.alibi_slopes = tangents.alibi_slopes;
  result.sinks = tangents.sinks;
  result.softcap = 0;
  result.dropout_p = 0;
  return result;
}

// One block of keys and values, and their tangents where those are not zero (data is null).
template <class Real>
struct TangentKeys {
  Rows<Real> key{}, value{}, tangent_key{}, tangent_value{};

  // Each of four pieces of memory holds max_keys rows.
  struct Memory {
    Real *key, *value, *tangent_key, *tangent_value;

    Memory(const AttentionProblem& p, int64_t max_keys, Scratch& scratch)
        : key(scratch.take<Real>(max_keys * p.head_dim)),
          value(scratch.take<Real>(max_keys * p.value_dim)),
          tangent_key(scratch.take<Real>(max_keys * p.head_dim)),
          tangent_value(scratch.take<Real>(max_keys * p.value_dim)) {}
  };

  static TangentKeys read(const AttentionProblem& p, const AttentionProblem& tangents, int64_t batch, int64_t kv_head,
                          int64_t first, int64_t count, bool few_queries, const Memory& memory) {
    const auto rows = [&](const TensorView& view, int64_t columns, Real* place) -> Rows<Real> {
      if (!view.defined()) return {};
      return key_value_rows(view, batch, kv_head, first, count, columns, few_queries, place);
    };
    return {rows(p.key, p.head_dim, memory.key), rows(p.value, p.value_dim, memory.value),
            rows(tangents.key, p.head_dim, memory.tangent_key),
            rows(tangents.value, p.value_dim, memory.tangent_value)};
  }
};

// One term of a sum of dots; absent if either side is null.
template <class Real>
struct DotTerm {
  Rows<Real> keys;
  const Real* panel;

  TA_INLINE bool present() const { return keys.data != nullptr && panel != nullptr; }
};

// out[key][lane] = factor · Σ_term keys[key]·panel[lane] for kRows keys.
template <class Real, int kRows, int kVectors>
TA_NOINLINE void dot_sum_tile(int64_t dim, const DotTerm<Real> (&terms)[2], int64_t first, Real factor, Real* out) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> acc[kRows][kVectors] = {};
  for (const DotTerm<Real>& term : terms) {
    if (!term.present()) continue;
    multiply_accumulate<Real, kRows, kVectors, Broadcast::kAlongRow>(
        acc, dim, term.keys.data + first * term.keys.stride, term.keys.stride, term.panel, width);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) store(out + m * width + n * n_lanes, acc[m][n] * factor);
  }
}

// The same for the block's keys [begin, end): the tangent of a dot by the product rule, 0 where both terms are absent.
template <class Real, int kVectors>
TA_INLINE void dot_sums(const KeySpan& span, int64_t dim, const DotTerm<Real> (&terms)[2], Real factor, Real* out) {
  constexpr int width = kVectors * kLanes<Real>;
  if (!terms[0].present() && !terms[1].present())
    return fill<Real>(out + span.begin * width, 0, (span.end - span.begin) * width);
  for_each_tile<kTileRows<kVectors>>(span.begin, span.end, [&]<int kRows>(int64_t key) TA_INLINE_LAMBDA {
    dot_sum_tile<Real, kRows, kVectors>(dim, terms, key, factor, out + key * width);
  });
}

// The scores of a panel with the keys of span, as score_tile gives them; with softcap, capped gets what it made of the
// dots.
template <class Real, int kVectors, bool kTrackMaximum>
TA_INLINE void capped_score_tile(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, const KeySpan& span,
                                 int64_t dim, Rows<Real> keys, const Real* panel, int64_t row, int64_t key,
                                 Real* scores, Real* capped, Real* maximum) {
  constexpr int width = kVectors * kLanes<Real>;
  if (!stage.softcap) {
    return score_tile<Real, kVectors, kTrackMaximum>(stage, bias, span, dim, keys, panel, row, key, scores, nullptr,
                                                     maximum);
  }
  dot_rows<Real, kVectors, false>(span.begin, span.end, dim, keys.data, keys.stride, panel, ScaledDots<Real>{1}, scores,
                                  nullptr);
  for (int64_t i = span.begin * width; i < span.end * width; i += kLanes<Real>) {
    const Vec<Real> value = stage.mod.capped(load(scores + i));
    store(scores + i, value);
    store(capped + i, value);
  }
  ScoreStage<Real> after_softcap = stage;
  after_softcap.softcap = false;
  modify_scores<Real, kVectors>(after_softcap, bias, span.has_edges(), row, key, span.begin, span.end, 1, scores,
                                nullptr, maximum);
}

// In place: tangents, in: t(q·k) · dot_factor, out: t(score). With softcap, capped becomes d score / d dot, and
// curvature, if not null, gets the tangent of that. added and bias are the tangents' own stage and mask values.
template <class Real, int kVectors>
TA_NOINLINE void tangent_scores(const ScoreStage<Real>& stage, const ScoreStage<Real>& added,
                                const BiasTile<Real>& bias, int64_t row, int64_t key, int64_t begin, int64_t end,
                                Real* tangents, Real* capped, Real* curvature) {
  using Math = VectorMath<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  for (int n = 0; n < kVectors; ++n) {
    Vec<Real> position{};
    for (int i = 0; i < n_lanes; ++i) position[i] = static_cast<Real>(stage.band.position(row + n * n_lanes + i) - key);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t place = j * width + n * n_lanes;
      Vec<Real> tangent = load(tangents + place);
      if (stage.softcap) {
        const Vec<Real> value = load(capped + place), derivative = stage.mod.capped_derivative(value);
        if (curvature != nullptr) store(curvature + place, stage.mod.capped_second_derivative(value) * tangent);
        store(capped + place, derivative);
        tangent *= derivative;
      }
      if (added.alibi) {
        tangent += ScoreMod<Math>::alibi_derivative(splat(static_cast<Real>(j)) - position) * added.mod.slope;
      }
      if (added.mask) {
        tangent += bias.per_lane != nullptr ? load(bias.per_lane + place) : splat(bias.per_key[j]);
      }
      store(tangents + place, tangent);
    }
  }
}

// weight · tangent, and 0 where the weight is: a key that is not attended may have any tangent.
template <class Real>
TA_INLINE Vec<Real> weighted(Vec<Real> weight, Vec<Real> tangent) {
  return weight == splat(Real{0}) ? splat(Real{0}) : weight * tangent;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
