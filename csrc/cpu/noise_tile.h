// The noise behind a draw (core/selection.h) for one vector of rows. Included by choice_tile.h.
#pragma once

#include "../core/selection.h"
#include "math.h"
#include "philox.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// log(2^k · (1 + f)) by atanh: with s = f / (2 + f), log(1 + f) = 2s + 2s³/3 + …; the minimax coefficients are
// fdlibm's e_log.c and FreeBSD's e_logf.c.
template <class Real>
struct LogConstants;

template <>
struct LogConstants<float> {
  static constexpr int32_t kOne = 0x3F800000, kHalfSqrt2 = 0x3F3504F3, kMantissa = 0x007FFFFF;
  static constexpr float kLn2High = 6.9313812256e-01f, kLn2Low = 9.0580006145e-06f;
  static constexpr float kPolynomial[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
};

template <>
struct LogConstants<double> {
  static constexpr int64_t kOne = 0x3FF0000000000000, kHalfSqrt2 = 0x3FE6A09E00000000, kMantissa = 0x000FFFFFFFFFFFFF;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kPolynomial[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                           2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                           1.479819860511658591e-01};
};

// VectorMath with a logarithm on whole vectors, of positive normal numbers only.
template <class Real>
struct NoiseMath : VectorMath<Real> {
  using typename VectorMath<Real>::Value;
  using typename VectorMath<Real>::Int;
  using VectorMath<Real>::splat;
  using Constants = LogConstants<Real>;

  static TA_INLINE Value log(Value x) {
    constexpr int kBits = ExpConstants<Real>::kMantissaBits;
    const Int one = splat_int<Real>(Constants::kOne), low = splat_int<Real>(Constants::kHalfSqrt2);
    const Int shifted = (Int)x + (one - low);
    const Value exponent = __builtin_convertvector((shifted >> kBits) - (one >> kBits), Value);
    const Value f = (Value)((shifted & splat_int<Real>(Constants::kMantissa)) + low) - splat(1);
    const Value s = f / (f + splat(2)), z = s * s, half_square = f * f * splat(Real(0.5));
    constexpr int kTerms = sizeof(Constants::kPolynomial) / sizeof(Real);
    Value rest = splat(Constants::kPolynomial[kTerms - 1]);
#pragma GCC unroll 8
    for (int i = kTerms - 2; i >= 0; --i) rest = rest * z + splat(Constants::kPolynomial[i]);
    const Value series = s * (half_square + rest * z) + exponent * splat(Constants::kLn2Low);
    return series - half_square + f + exponent * splat(Constants::kLn2High);
  }
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
