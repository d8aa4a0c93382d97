// What the kernels for bfloat16 share beside the tiles: the width of a panel, and the exponential of weights that will
// be rounded to bfloat16. Included by forward.h, weights.h and decode_pairs.h.
#pragma once

#include "../isa.h"
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

// Whether a call of numbers in pieces is large enough for tiles to be faster than vectors, or AMX is forced: operands
// are made, and padded, for each. Measured on B1 H8: float32 takes 1.04 times as long with 128 rows and keys of
// head_dim 64, 1.4 times with 48; float16 1.06 times with 48. Columns are padded to 32: float32 of head_dim 24 and 40
// takes 1.1 times as long with 256 rows and keys, and gains nothing (1.0 to 1.05) with 512.
template <class Stored>
TA_INLINE bool gains_by_pieces(const AttentionProblem& p) {
  if (kPiecesOf<Stored> == 1 || is_isa_forced()) return true;
  const int64_t scores = p.query_length * p.key_length;
  if constexpr (kPiecesOf<Stored> == 2) return p.query_length >= 32 && p.key_length >= 32 && scores >= 64 * 64;
  const int64_t columns = p.head_dim + p.value_dim;
  const int64_t padded = round_up(p.head_dim, kTileDepth) + round_up(p.value_dim, kTileDepth);
  return p.query_length >= 128 && p.key_length >= 64 && scores >= 160 * 160 && 4 * columns > 3 * padded;
}

// The exponential of weights that will be split into the pieces of a Stored number.
template <class Stored>
TA_INLINE Vec<float> exp_for(Vec<float> x) {
  if constexpr (sizeof(Stored) == 4) return VectorMath<float>::exp(x);
  return exp_for_half(x);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
