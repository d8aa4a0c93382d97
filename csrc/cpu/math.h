// VectorMath: the Math policy that core/score_mod.h and core/online_softmax.h ask for, on vectors of lanes. Included by
// the kernel headers.
#pragma once

#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// exp(r) = 1 + r + r²·(c[0] + c[1]·r + …) for |r| ≤ ln(2) / 2; minimax in relative error (float 3.1e-9,
// double 3.7e-18). x = n·ln(2) + r, where n·kLn2High is exact (Cody and Waite 1980). Adding kRounder leaves n plus the
// exponent's bias in the low mantissa bits, ready to be shifted into 2^n.
template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRounder = 12583039.0f;  // 1.5 · 2^23 + 127
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.33f;  // below, the result is flushed to 0: denormals are slow
  static constexpr int kMantissaBits = 23;
  static constexpr float kPolynomial[] = {0.49999993411977853f, 0.16666520102727809f, 0.041668394315873607f,
                                          0.0083687808838756529f, 0.0013814462047779557f};
};

// 2^f = 1 + f·(c[0] + c[1]·f + …) for |f| ≤ 1/2; minimax in relative error (9.2e-8).
struct PowerConstants {
  static constexpr float kPolynomial[] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f,
                                          0.009671512991189957f, 0.001326472731307149f};
  static constexpr float kLowest = -125.0f;  // below 2^kLowest, the result is flushed to 0: denormals are slow
};

template <>
struct ExpConstants<double> {
  static constexpr double kRounder = 6755399441056767.0;  // 1.5 · 2^52 + 1023
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -708.39;
  static constexpr int kMantissaBits = 52;
  static constexpr double kPolynomial[] = {
      0.50000000000000107228,   0.16666666666666410214,    0.041666666666529173616,    0.0083333333334956257898,
      0.0013888888943926320422, 0.00019841269504775810238, 0.000024801492759232351359, 2.7557587323963716065e-6,
      2.7630379812409104754e-7, 2.4999973124174449886e-8};
};

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

template <class RealType>
struct VectorMath {
  using Real = RealType;
  using Value = Vec<Real>;
  using Int = IntVec<Real>;
  using Constants = ExpConstants<Real>;

  static TA_INLINE Value splat(Real x) { return x - Value{}; }
  static TA_INLINE Value negative_infinity() { return splat(-static_cast<Real>(__builtin_inf())); }
  static TA_INLINE Value select_equal(Value a, Value b, Value if_equal, Value otherwise) {
    return a == b ? if_equal : otherwise;
  }
  static TA_INLINE Value select_less(Value a, Value b, Value if_less, Value otherwise) {
    return a < b ? if_less : otherwise;
  }
  // score + added, but −∞ where added is −∞, whatever the score.
  static TA_INLINE Value add_to_score(Value score, Value added) {
    const Value sum = score + added;
#if defined(__AVX512F__)
    constexpr int kKeepAllButNegativeInfinity = 0x00040000;
    if constexpr (sizeof(Real) == 4) {
      return _mm512_fixupimm_ps(sum, added, _mm512_set1_epi32(kKeepAllButNegativeInfinity), 0);
    } else {
      return _mm512_fixupimm_pd(sum, added, _mm512_set1_epi64(kKeepAllButNegativeInfinity), 0);
    }
#else
    return select_equal(added, negative_infinity(), negative_infinity(), sum);
#endif
  }
  static TA_INLINE Value abs(Value x) { return (Value)((Int)x & ~(Int)splat(Real(-0.0))); }

  // About 2 ulp, as far as x · factor is exact; a NaN stays one. The kernels only pass products ≤ 0, up to rounding;
  // above 88 (double: 709) the result is undefined.
  static TA_INLINE Value exp(Value x, Real factor = 1) {
    if constexpr (sizeof(Real) == 4) {
      return power_of_2(x, factor * 1.44269504f);
    } else {
      x *= splat(factor);
      const Reduced reduced = reduce(x);
      const Value y = (reduced.slope * reduced.r + splat(1)) * reduced.power;
      return x < splat(Constants::kLowest) ? splat(0) : y;
    }
  }

  // About 2 ulp, also near 0: with t = exp(−2|x|) − 1 kept as 2^n·(exp(r) − 1) + (2^n − 1), tanh|x| = −t / (t + 2).
  static TA_INLINE Value tanh(Value x) {
    const Value doubled = cpu::TORCH_ATTN_ISA::max(splat(Constants::kLowest), abs(x) * splat(-2));
    const Reduced reduced = reduce(doubled);
    const Value t = reduced.slope * reduced.r * reduced.power + (reduced.power - splat(1));
    const Value magnitude = -t / (t + splat(2));
    const Int sign = (Int)x & (Int)splat(Real(-0.0));
    return (Value)((Int)magnitude | sign);
  }

  // About 1 ulp, of positive normal numbers.
  static TA_INLINE Value log_of_normal(Value x) {
    using Log = LogConstants<Real>;
    constexpr int kBits = Constants::kMantissaBits;
    const Int one = splat_int<Real>(Log::kOne), low = splat_int<Real>(Log::kHalfSqrt2);
    const Int shifted = (Int)x + (one - low);
    const Value exponent = __builtin_convertvector((shifted >> kBits) - (one >> kBits), Value);
    const Value f = (Value)((shifted & splat_int<Real>(Log::kMantissa)) + low) - splat(1);
    const Value s = f / (f + splat(2)), z = s * s, half_square = f * f * splat(Real(0.5));
    constexpr int kTerms = sizeof(Log::kPolynomial) / sizeof(Real);
    Value rest = splat(Log::kPolynomial[kTerms - 1]);
#pragma GCC unroll 8
    for (int i = kTerms - 2; i >= 0; --i) rest = rest * z + splat(Log::kPolynomial[i]);
    const Value series = s * (half_square + rest * z) + exponent * splat(Log::kLn2Low);
    return series - half_square + f + exponent * splat(Log::kLn2High);
  }
  // Of any: lane by lane if one is not such a number. Once a row, yet that took 1 % of bfloat16's forward pass.
  static TA_INLINE Value log(Value x) {
    constexpr Real kSmallest = sizeof(Real) == 4 ? static_cast<Real>(__FLT_MIN__) : static_cast<Real>(__DBL_MIN__);
    const Int usual = (x >= splat(kSmallest)) & (x < splat(static_cast<Real>(__builtin_inf())));
    if (lane_bits(~usual) == 0) return log_of_normal(x);
    for (int i = 0; i < kLanes<Real>; ++i) x[i] = log(x[i]);
    return x;
  }

 private:
  // 2^(x · rate). Exponentials are a tenth of attention's instructions at head_dim 64: here each counts.
  static TA_INLINE Vec<float> power_of_2(Vec<float> x, float rate) {
    constexpr float kRounder = ExpConstants<float>::kRounder;
    const Vec<float> shifted = x * rate + kRounder, n = shifted - kRounder, f = x * rate - n;
    constexpr int kTerms = sizeof(PowerConstants::kPolynomial) / sizeof(float);
    Vec<float> y = PowerConstants::kPolynomial[kTerms - 1] - Vec<float>{};
#pragma GCC unroll 8
    for (int i = kTerms - 2; i >= 0; --i) y = y * f + PowerConstants::kPolynomial[i];
    y = y * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask(n, _mm512_set1_ps(PowerConstants::kLowest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, y, n);
#else
    y *= (Vec<float>)((VecTypes<float>::Int)shifted << ExpConstants<float>::kMantissaBits);
    return n < PowerConstants::kLowest - Vec<float>{} ? Vec<float>{} : y;
#endif
  }

  struct Reduced {
    Value r;
    Value slope;  // (exp(r) − 1) / r
    Value power;  // 2^n
  };
  static TA_INLINE Reduced reduce(Value x) {
    const Value shifted = x * splat(Real(1.4426950408889634074)) + splat(Constants::kRounder);
    const Value n = shifted - splat(Constants::kRounder);
    const Value r = (x - n * splat(Constants::kLn2High)) - n * splat(Constants::kLn2Low);
    constexpr int kTerms = sizeof(Constants::kPolynomial) / sizeof(Real);
    Value slope = splat(Constants::kPolynomial[kTerms - 1]);
#pragma GCC unroll 16
    for (int i = kTerms - 2; i >= 0; --i) slope = slope * r + splat(Constants::kPolynomial[i]);
    slope = slope * r + splat(1);
    const Int power = (Int)shifted << Constants::kMantissaBits;
    return {r, slope, (Value)power};
  }
  static TA_INLINE float log(float x) { return __builtin_logf(x); }
  static TA_INLINE double log(double x) { return __builtin_log(x); }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
