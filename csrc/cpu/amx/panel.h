// What the AMX kernels share beside the tiles: the width of a panel, and the exponential of weights that will be
// rounded to bfloat16. Included by amx/forward.h and amx/weights.h.
#pragma once

#include "../math.h"
#include "../panel.h"
#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// One panel is two vectors of lanes: two tiles wide, as one 2 × 2 block of tile products needs.
constexpr int kAmxVectors = 2;
constexpr int64_t kAmxLanes = kAmxVectors * kLanes<float>;
constexpr int64_t kAmxKeys = 128;  // at most, see amx_key_block

// exp(x) for x ≤ kMaximumSlack, with a relative error of 3e-6: for weights that are then rounded to bfloat16. A NaN
// stays one; below the smallest normal number the result is 0. The caller subtracts first: taking log2(e) into the
// scores' factor would save a multiplication, but lets a large maximum's rounding error through.
TA_INLINE Vec<float> exp_for_half(Vec<float> x) {
  constexpr float kRounder = ExpConstants<float>::kRounder;
  const Vec<float> t = x * 1.44269504f, shifted = t + kRounder, f = t - (shifted - kRounder);
  // 2^f, minimax on |f| ≤ 1/2.
  const Vec<float> y =
      (((0.00958277178404f * f + 0.0559072210405f) * f + 0.240241046684f) * f + 0.693124103426f) * f + 1.0f;
  const Vec<float> power = (Vec<float>)((IntVec<float>)shifted << ExpConstants<float>::kMantissaBits);
  return t < splat(-126.0f) ? splat(0.0f) : y * power;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
