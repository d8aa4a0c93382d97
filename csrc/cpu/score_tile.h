// From query and key rows to a tile of scores: dots, then whatever core/score_mod.h, the mask and the band (causal,
// windows, key lengths) do to them. Included by forward.h and backward.h, which thus compute identical scores.
#pragma once

#include "../core/mask.h"
#include "../core/score_mod.h"
#include "gemm.h"
#include "mask_tile.h"
#include "math.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A panel's share of a block of keys, as indices into the block.
struct KeySpan {
  int64_t begin, end;                // keys that some row attends, widened to whole register tiles
  int64_t inside_begin, inside_end;  // keys that every row attends: no element test is needed there

  TA_INLINE bool empty() const { return end <= begin; }
  TA_INLINE bool has_edges() const { return inside_begin != begin || inside_end != end; }

  // Rows [row, row + rows), keys [key, key + keys); ends are multiples of granule, or the block's own.
  static TA_INLINE KeySpan of(const BandMask& band, int64_t row, int64_t rows, int64_t key, int64_t keys,
                              int64_t granule) {
    const KeyRange any = band.keys_of_any(row, row + rows), all = band.keys_of_all(row, row + rows);
    const auto clamp = [&](int64_t x) { return x < 0 ? int64_t{0} : x > keys ? keys : x; };
    KeySpan span;
    span.begin = round_down(clamp(any.begin - key), granule);
    span.end = smaller(round_up(clamp(any.end - key), granule), keys);
    if (any.empty() || clamp(any.begin - key) >= clamp(any.end - key)) span.begin = span.end = 0;
    span.inside_begin = smaller(round_up(clamp(all.begin - key), granule), span.end);
    const int64_t inside_end = clamp(all.end - key);
    span.inside_end = inside_end >= span.end ? span.end : round_down(inside_end, granule);
    if (span.inside_begin < span.begin) span.inside_begin = span.begin;
    if (span.inside_end <= span.inside_begin) span.inside_begin = span.inside_end = span.end;
    return span;
  }
};

// What the scores of one (batch, head) go through.
template <class Real>
struct ScoreStage {
  ScoreMod<VectorMath<Real>> mod;
  BandMask band;
  bool softcap, alibi, mask;
  bool raw = false;  // see leave_dots_raw
  MaskRows mask_rows;

  ScoreStage(const AttentionProblem& p, int64_t batch, int64_t head)
      : mod{static_cast<Real>(p.scale), static_cast<Real>(p.softcap)},
        band(band_mask_of_selected_rows(p, batch)),
        softcap(p.softcap != 0),
        alibi(p.alibi_slopes.defined()),
        mask(p.attn_mask.defined()) {
    if (alibi) mod.slope = head_number<Real>(p.alibi_slopes, batch, head);
    if (mask) {
      mask_rows = {element(p.attn_mask, batch, head, 0), p.attn_mask.dtype,
                   p.attn_mask.stride[2] * element_size(p.attn_mask.dtype), p.attn_mask.stride[3], p.key_length};
    }
  }

  TA_INLINE bool changes_elements(const BiasTile<Real>& bias) const { return softcap || alibi || !bias.empty(); }
  // What dots are multiplied by as they leave the registers; softcap applies the scale itself.
  TA_INLINE Real dot_factor() const { return softcap || raw ? Real{1} : mod.scale; }
  // Whether nothing but the band and a positive scale changes scores.
  TA_INLINE bool only_scales() const { return !softcap && !alibi && !mask && mod.scale > 0; }
  // Then the scale can wait for the exponential, which multiplies anyway: from here on a tile holds score /
  // score_factor().
  TA_INLINE void leave_dots_raw() { raw = only_scales(); }
  TA_INLINE Real score_factor() const { return raw ? mod.scale : Real{1}; }
  // Whether score_tile may find a bias tile where it is to put the scores: one array less in the L1 cache. A boolean
  // mask's words serve many keys each.
  TA_INLINE bool takes_bias_in_place(const KeySpan& span) const {
    return !softcap && !alibi && !span.has_edges() && mask_rows.dtype != ScalarType::kBool;
  }
  TA_INLINE bool mask_is_per_key() const { return mask && mask_rows.row_stride == 0; }
};

enum class Bias { kNone, kPerKey, kPerLane, kAttended };

// What the mask makes of the scores of the block's number j at lanes lane, lane + 1, … of a panel of that width.
template <class Real, Bias kBias>
TA_INLINE Vec<Real> with_bias(const BiasTile<Real>& bias, Vec<Real> score, int64_t j, int64_t width, int64_t lane) {
  using Math = VectorMath<Real>;
  if constexpr (kBias == Bias::kPerKey) return Math::add_to_score(score, splat(bias.per_key[j]));
  if constexpr (kBias == Bias::kPerLane) return Math::add_to_score(score, load(bias.per_lane + j * width + lane));
  if constexpr (kBias == Bias::kAttended) {
    using Unsigned = typename VecTypes<Real>::Unsigned;
    const auto* words = reinterpret_cast<const Real*>(bias.attended + j / kKeysPerWord<Real> * width + lane);
    const Unsigned wanted = Word<Real>{1} << j % kKeysPerWord<Real> | Unsigned{};
    return ((Unsigned)load(words) & wanted) != 0 ? score : Math::negative_infinity();
  }
  return score;
}

// dot_tile's finish where nothing but a mask changes the scores.
template <class Real, int kVectors, Bias kBias>
struct MaskedScores {
  Real factor;
  BiasTile<Real> bias;

  static TA_INLINE bool changes_them() { return true; }
  TA_INLINE Vec<Real> operator()(Vec<Real> dots, int64_t key, int64_t lane) const {
    return with_bias<Real, kBias>(bias, dots * factor, key, kVectors * kLanes<Real>, lane);
  }
};

// modify_scores with what it has to do known at compile time.
template <class Real, int kVectors, Bias kBias, bool kBand, bool kCurved>
TA_INLINE void modify_scores_as(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, int64_t row, int64_t key,
                                int64_t begin, int64_t end, Real factor, Real* scores, Real* derivative,
                                Real* maximum) {
  using Math = VectorMath<Real>;
  using Int = IntVec<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  const BandMask& band = stage.band;
  // As far as they lie near the block: numbers beyond it may not fit an Int.
  const auto near = [&](int64_t x) { return x < -width ? -width : x > end ? end : x; };
  Int first[kVectors]{}, last[kVectors]{};
  Vec<Real> position[kVectors]{}, highest[kVectors]{};
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const int64_t lane = n * n_lanes;
    if constexpr (kBand) {
      if (band.rows == nullptr) {
        const int64_t place = band.position(row) - key + lane;
        first[n] = splat_int<Real>(near(place - band.window_left)) + lane_numbers<Real>();
        last[n] = splat_int<Real>(near(place + band.window_right)) + lane_numbers<Real>();
      } else {
        for (int i = 0; i < n_lanes; ++i) {
          const int64_t place = band.position(row + lane + i) - key;
          first[n][i] = static_cast<typename VecTypes<Real>::IntElement>(near(place - band.window_left));
          last[n][i] = static_cast<typename VecTypes<Real>::IntElement>(near(place + band.window_right));
        }
      }
      const Int last_valid = splat_int<Real>(near(band.key_length - 1 - key));
      last[n] = last[n] < last_valid ? last[n] : last_valid;
    }
    if constexpr (kCurved) {
      if (stage.alibi) {
        for (int i = 0; i < n_lanes; ++i) {
          position[n][i] = static_cast<Real>(band.position(row + lane + i) - key);
        }
      }
    }
    if (maximum != nullptr) highest[n] = load(maximum + lane);
  }
  for (int64_t j = begin; j < end; ++j) {
    // A key's vectors together: the maxima are chains of their own.
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int64_t offset = j * width + n * n_lanes;
      Vec<Real> score = load(scores + offset) * factor;
      if constexpr (kCurved) {
        if (stage.softcap) {
          score = stage.mod.capped(score);
          if (derivative != nullptr) store(derivative + offset, stage.mod.capped_derivative(score));
        }
        if (stage.alibi) {
          score += ScoreMod<Math>::alibi_derivative(splat(static_cast<Real>(j)) - position[n]) * stage.mod.slope;
        }
      }
      score = with_bias<Real, kBias>(bias, score, j, width, n * n_lanes);
      if constexpr (kBand) {
        const Int number = splat_int<Real>(j);
        score = (number < first[n]) | (number > last[n]) ? Math::negative_infinity() : score;
      }
      store(scores + offset, score);
      highest[n] = max(highest[n], score);
    }
  }
  if (maximum == nullptr) return;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) store(maximum + n * n_lanes, highest[n]);
}

// Dots become scores, in place, for the block's keys [begin, end) and a panel that starts at row: first they are
// multiplied by factor, which is 1 where they already were or will be (see ScoreStage). key is the block's first key.
// derivative, if wanted (with softcap), gets d score / d dot; maximum, if not null, is raised to include the scores. A
// key that the mask or the band excludes scores −∞, even if its dot is NaN.
template <class Real, int kVectors>
TA_NOINLINE void modify_scores(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, bool band_applies,
                               int64_t row, int64_t key, int64_t begin, int64_t end, Real factor, Real* scores,
                               Real* derivative, Real* maximum) {
  const auto with = [&]<Bias kBias, bool kBand, bool kCurved>() TA_INLINE_LAMBDA {
    modify_scores_as<Real, kVectors, kBias, kBand, kCurved>(stage, bias, row, key, begin, end, factor, scores,
                                                            derivative, maximum);
  };
  const auto masked = [&]<Bias kBias>() TA_INLINE_LAMBDA {
    if (stage.softcap || stage.alibi) {
      band_applies ? with.template operator()<kBias, true, true>() : with.template operator()<kBias, false, true>();
    } else {
      band_applies ? with.template operator()<kBias, true, false>() : with.template operator()<kBias, false, false>();
    }
  };
  if (bias.per_lane != nullptr) return masked.template operator()<Bias::kPerLane>();
  if (bias.per_key != nullptr) return masked.template operator()<Bias::kPerKey>();
  if (bias.attended != nullptr) return masked.template operator()<Bias::kAttended>();
  masked.template operator()<Bias::kNone>();
}

// The scores of a panel with the keys of span. kTrackMaximum: maximum is raised to include them.
template <class Real, int kVectors, bool kTrackMaximum, class Between = NothingBetween>
TA_INLINE void score_tile(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, const KeySpan& span, int64_t dim,
                          Rows<Real> keys, const Real* panel, int64_t row, int64_t key, Real* scores, Real* derivative,
                          Real* maximum, const Between& between = {}) {
  const auto modified = [&](int64_t begin, int64_t end, bool band_applies) {
    if (begin >= end) return;
    dot_rows<Real, kVectors, false>(begin, end, dim, keys.data, keys.stride, panel,
                                    ScaledDots<Real>{stage.dot_factor()}, scores, nullptr, between);
    modify_scores<Real, kVectors>(stage, bias, band_applies, row, key, begin, end, 1, scores, derivative, maximum);
  };
  if (stage.softcap || stage.alibi) return modified(span.begin, span.end, span.has_edges());
  modified(span.begin, span.inside_begin, true);
  const auto inside = [&](const auto& finish) TA_INLINE_LAMBDA {
    dot_rows<Real, kVectors, kTrackMaximum>(span.inside_begin, span.inside_end, dim, keys.data, keys.stride, panel,
                                            finish, scores, maximum, between);
  };
  if (bias.per_lane != nullptr) {
    inside(MaskedScores<Real, kVectors, Bias::kPerLane>{stage.dot_factor(), bias});
  } else if (bias.attended != nullptr) {
    inside(MaskedScores<Real, kVectors, Bias::kAttended>{stage.dot_factor(), bias});
  } else if (bias.per_key != nullptr) {
    inside(MaskedScores<Real, kVectors, Bias::kPerKey>{stage.dot_factor(), bias});
  } else {
    inside(ScaledDots<Real>{stage.dot_factor()});
  }
  modified(span.inside_end, span.end, true);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
