// The noise behind a draw (core/selection.h) for one vector of rows. Included by choice_tile.h.
#pragma once

#include "../core/selection.h"
#include "math.h"
#include "philox.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// VectorMath with a logarithm of positive normal numbers only.
template <class Real>
struct NoiseMath : VectorMath<Real> {
  using typename VectorMath<Real>::Value;

  static TA_INLINE Value log(Value x) { return VectorMath<Real>::log_of_normal(x); }
};

template <class Real>
using NoiseWords = RowWords<Real, SelectionNoise::kRounds>;

// Word j of a Philox call for each row of a vector, as numbers.
template <class Real>
TA_INLINE Vec<Real> as_number(typename VecTypes<Real>::Unsigned word) {
  return __builtin_convertvector(word, Vec<Real>);
}
template <class Real>
TA_INLINE Vec<Real> exponential_of(const NoiseWords<Real>& words, int j) {
  return exponential_variate<NoiseMath<Real>>(as_number<Real>(words.word(j)));
}
template <class Real>
TA_INLINE Vec<Real> uniform_of(const NoiseWords<Real>& words, int j) {
  return as_number<Real>(words.word(j) >> 8) * splat(kUniformUnit<Real>);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
