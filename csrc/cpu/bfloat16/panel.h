// What the kernels for bfloat16 share beside the tiles: the width of a panel, and the exponential of weights that will
// be rounded to bfloat16. Included by forward.h, weights.h and decode_pairs.h.
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
// stays one; near the smallest normal number and below the result is 0. The caller subtracts first: taking log2(e) into
// the scores' factor would save a multiplication, but lets a large maximum's rounding error through.
TA_INLINE Vec<float> exp_for_half(Vec<float> x) {
  const Vec<float> t = x * 1.44269504f;
  const Vec<float> f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);  // t − ⌊t⌋
  // 2^f, minimax on 0 ≤ f < 1.
  const Vec<float> y = (((0.013534168f * f + 0.05201146f) * f + 0.24144275f) * f + 0.69300383f) * f + 1.0000026f;
  const __mmask16 normal = _mm512_cmp_ps_mask(t, splat(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, y, t);  // multiplies by 2^⌊t⌋
}

// The exponential of weights that will be split into the pieces of a Stored number.
template <class Stored>
TA_INLINE Vec<float> exp_for(Vec<float> x) {
  if constexpr (sizeof(Stored) == 4) return VectorMath<float>::exp(x);
  return exp_for_half(x);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
