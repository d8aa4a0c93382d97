// The ends of a band (causal diagonals, a window's, the last key) in a panel's scores where nothing else changes them:
// a key's lanes that attend it are an interval, so that one masked store a vector of the edges' keys will do. Other
// scores go through ../score_tile.h. Included by forward_stages.h and walk.h.
#pragma once

#include "../score_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Whether the keys of span may take exclude_outside: scores are then divided by factor, whose sign −∞ survives.
TA_INLINE bool has_plain_edges(const ScoreStage<float>& stage, const BiasTile<float>& bias, const KeySpan& span,
                               float factor) {
  return span.has_edges() && !stage.changes_elements(bias) && stage.band.rows == nullptr && factor > 0;
}

// Scores of keys outside of their row's interval become −∞. row and key are those of lane 0 and of scores' first key.
TA_NOINLINE inline void exclude_outside(const BandMask& band, const KeySpan& span, int64_t row, int64_t key,
                                        float* scores) {
  const int64_t position = band.position(row) - key, keys = band.key_length - key;
  const auto lanes_below = [](int64_t lane) {
    return (uint64_t{1} << (lane < 0 ? 0 : lane > kAmxLanes ? kAmxLanes : lane)) - 1;
  };
  const Vec<float> nothing = splat(-__builtin_inff());
  const auto exclude = [&](int64_t begin, int64_t end) TA_INLINE_LAMBDA {
    for (int64_t j = begin; j < end; ++j) {
      const uint64_t attending =
          lanes_below(j - position + band.window_left + 1) & ~lanes_below(j - position - band.window_right);
      const auto excluded = static_cast<uint32_t>(j < keys ? ~attending : ~uint64_t{0});
      float* place = scores + j * kAmxLanes;
      _mm512_mask_storeu_ps(place, static_cast<__mmask16>(excluded), nothing);
      _mm512_mask_storeu_ps(place + kLanes<float>, static_cast<__mmask16>(excluded >> 16), nothing);
    }
  };
  exclude(span.begin, span.inside_begin);
  exclude(span.inside_end, span.end);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
