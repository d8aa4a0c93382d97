// From query and key rows to a tile of scores: dots, then whatever core/score_mod.h, the mask and the band (causal,
// windows, key lengths) do to them. Included by forward.h and backward.h, which thus compute identical scores.
#pragma once

#include "../core/mask.h"
#include "../core/score_mod.h"
#include "gemm.h"
#include "math.h"
#include "pack.h"

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
  const char* mask_data = nullptr;  // the mask's element (batch, head, 0, 0)
  ScalarType mask_dtype = ScalarType::kBool;
  int64_t mask_row_stride = 0, mask_column_stride = 0;  // in bytes; in elements
  int64_t keys;                                         // the mask's row length

  ScoreStage(const AttentionProblem& p, int64_t batch, int64_t head)
      : mod{static_cast<Real>(p.scale), static_cast<Real>(p.softcap)},
        band(band_mask_of_selected_rows(p, batch)),
        softcap(p.softcap != 0),
        alibi(p.alibi_slopes.defined()),
        mask(p.attn_mask.defined()),
        keys(p.key_length) {
    if (alibi) mod.slope = head_number<Real>(p.alibi_slopes, batch, head);
    if (mask) {
      mask_data = element(p.attn_mask, batch, head, 0);
      mask_dtype = p.attn_mask.dtype;
      mask_row_stride = p.attn_mask.stride[2] * element_size(mask_dtype);
      mask_column_stride = p.attn_mask.stride[3];
    }
  }

  TA_INLINE bool changes_elements() const { return softcap || alibi || mask; }
  // What dots are multiplied by as they leave the registers; softcap applies the scale itself.
  TA_INLINE Real dot_factor() const { return softcap ? Real{1} : mod.scale; }
  TA_INLINE bool mask_is_per_key() const { return mask && mask_row_stride == 0; }
  TA_INLINE const char* mask_element(int64_t row, int64_t key) const {
    return mask_data + row * mask_row_stride + key * mask_column_stride * element_size(mask_dtype);
  }
};

// The mask's values for a tile: none, one per key, or one per key and lane.
template <class Real>
struct BiasTile {
  const Real* per_key = nullptr;
  const Real* per_lane = nullptr;  // [key][lane]
};

template <class Real>
TA_NOINLINE bool all_masked(const Real* bias, int64_t count) {
  const Real nothing = -static_cast<Real>(__builtin_inf());
  for (int64_t i = 0; i < count; ++i) {
    if (!(bias[i] == nothing)) return false;
  }
  return true;
}

// Loads the mask's values for keys [key, key + keys), as far as they exist, as one value per key. False if they mask
// every key.
template <class Real>
TA_INLINE bool load_bias_per_key(const ScoreStage<Real>& stage, int64_t key, int64_t keys, Real* out) {
  keys = smaller(keys, stage.keys - key);
  load_row(out, stage.mask_dtype, stage.mask_element(0, key), stage.mask_column_stride, keys);
  return !all_masked(out, keys);
}

// Loads them as one value per key and lane, for rows [row, row + rows) and the block's keys [begin, end); out is
// indexed from the block's first key. staging holds width × round_up(keys, lanes). False if they mask everything.
template <class Real>
TA_NOINLINE bool load_bias_per_lane(const ScoreStage<Real>& stage, int64_t row, int64_t rows, int64_t width,
                                    int64_t key, int64_t begin, int64_t end, Real* staging, Real* out) {
  const int64_t keys = smaller(end, stage.keys - key) - begin, stride = round_up(keys, kLanes<Real>);
  bool nothing_attended = true;
  for (int64_t i = 0; i < rows; ++i) {
    Real* values = staging + i * stride;
    load_row(values, stage.mask_dtype, stage.mask_element(row + i, key + begin), stage.mask_column_stride, keys);
    nothing_attended = nothing_attended && all_masked(values, keys);
    for (int64_t j = keys; j < stride; ++j) values[j] = 0;
  }
  pack_panel(out + begin * width, width, staging, stride, rows, keys);
  return !nothing_attended;
}

// Dots become scores, in place, for the block's keys [begin, end) and a panel that starts at row: first they are
// multiplied by factor, which is 1 where they already were (see ScoreStage::dot_factor). key is the block's first key.
// derivative, if wanted (with softcap), gets d score / d dot; maximum, if not null, is raised to include the scores. A
// key that the mask or the band excludes scores −∞, even if its dot is NaN.
template <class Real, int kVectors>
TA_NOINLINE void modify_scores(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, bool band_applies,
                               int64_t row, int64_t key, int64_t begin, int64_t end, Real factor, Real* scores,
                               Real* derivative, Real* maximum) {
  using Math = VectorMath<Real>;
  using Int = IntVec<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  alignas(64) typename VecTypes<Real>::IntElement first_key[width], end_key[width];
  alignas(64) Real position[width];
  for (int i = 0; i < width; ++i) {
    const KeyRange range = stage.band.keys_of_row(row + i);
    const auto clamp = [&](int64_t x) { return x < 0 ? int64_t{0} : x > end ? end : x; };
    first_key[i] = band_applies ? clamp(range.begin - key) : 0;
    end_key[i] = band_applies ? clamp(range.end - key) : end;
    position[i] = static_cast<Real>(stage.band.position(row + i) - key);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const Int first = *reinterpret_cast<const Int*>(first_key + n * n_lanes);
    const Int last = *reinterpret_cast<const Int*>(end_key + n * n_lanes) - 1;
    const Vec<Real> lane_position = load(position + n * n_lanes);
    Vec<Real> highest{};
    if (maximum != nullptr) highest = load(maximum + n * n_lanes);
    for (int64_t j = begin; j < end; ++j) {
      Real* place = scores + j * width + n * n_lanes;
      Vec<Real> score = load(place) * factor;
      if (stage.softcap) {
        score = stage.mod.capped(score);
        if (derivative != nullptr) store(derivative + j * width + n * n_lanes, stage.mod.capped_derivative(score));
      }
      if (stage.alibi) {
        score += ScoreMod<Math>::alibi_derivative(splat(static_cast<Real>(j)) - lane_position) * stage.mod.slope;
      }
      if (stage.mask) {
        const Vec<Real> added =
            bias.per_lane != nullptr ? load(bias.per_lane + j * width + n * n_lanes) : splat(bias.per_key[j]);
        score = Math::select_equal(added, Math::negative_infinity(), Math::negative_infinity(), score + added);
      }
      const Int number = splat_int<Real>(j);
      score = (number < first) | (number > last) ? Math::negative_infinity() : score;
      store(place, score);
      highest = max(highest, score);
    }
    if (maximum != nullptr) store(maximum + n * n_lanes, highest);
  }
}

// The scores of a panel with the keys of span. kTrackMaximum: maximum is raised to include them.
template <class Real, int kVectors, bool kTrackMaximum>
TA_INLINE void score_tile(const ScoreStage<Real>& stage, const BiasTile<Real>& bias, const KeySpan& span, int64_t dim,
                          Rows<Real> keys, const Real* panel, int64_t row, int64_t key, Real* scores, Real* derivative,
                          Real* maximum) {
  const auto dots = [&](int64_t begin, int64_t end) TA_INLINE_LAMBDA {
    dot_rows<Real, kVectors, false>(begin, end, dim, keys.data, keys.stride, panel, stage.dot_factor(), scores,
                                    nullptr);
  };
  if (stage.changes_elements()) {
    dots(span.begin, span.end);
    modify_scores<Real, kVectors>(stage, bias, span.has_edges(), row, key, span.begin, span.end, 1, scores, derivative,
                                  maximum);
    return;
  }
  const auto edge = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    dots(begin, end);
    modify_scores<Real, kVectors>(stage, bias, true, row, key, begin, end, 1, scores, nullptr, maximum);
  };
  edge(span.begin, span.inside_begin);
  dot_rows<Real, kVectors, kTrackMaximum>(span.inside_begin, span.inside_end, dim, keys.data, keys.stride, panel,
                                          stage.dot_factor(), scores, maximum);
  edge(span.inside_end, span.end);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
