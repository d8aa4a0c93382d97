// Vectors of the instruction set being compiled, as GCC vector types, and the few operations that plain C++ operators
// on them lack. Included by every kernel header. A file of instantiate/ defines TORCH_ATTN_ISA, which becomes the
// namespace: nothing here may be shared between instruction sets, or the linker could pick the wide one for a narrow
// CPU. For the same reason kernels use no inline functions or templates of the standard library.
#pragma once

#ifndef TORCH_ATTN_ISA
#error "TORCH_ATTN_ISA must be defined as the name of the instruction set, see instantiate/"
#endif

#include <cstdint>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define TA_INLINE inline __attribute__((always_inline))
#define TA_NOINLINE __attribute__((noinline))
#define TA_INLINE_LAMBDA __attribute__((always_inline))

namespace torch_attn::cpu::TORCH_ATTN_ISA {

#if defined(__AVX512F__)
#define TA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TA_VECTOR_BYTES 32
#else
#define TA_VECTOR_BYTES 16
#endif

// Real is the accumulator type, float or double. Value is a vector of it, Int the integer of the same width, which also
// is the type of a comparison's result.
template <class Real>
struct VecTypes;

template <>
struct VecTypes<float> {
  typedef float Value __attribute__((vector_size(TA_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(TA_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(TA_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(TA_VECTOR_BYTES)));
  using IntElement = int32_t;
  using WordElement = uint32_t;
};

template <>
struct VecTypes<double> {
  typedef double Value __attribute__((vector_size(TA_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(TA_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(TA_VECTOR_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(TA_VECTOR_BYTES)));
  using IntElement = int64_t;
  using WordElement = uint64_t;
};

template <class Real>
using Vec = typename VecTypes<Real>::Value;
template <class Real>
using IntVec = typename VecTypes<Real>::Int;

template <class Real>
constexpr int kLanes = TA_VECTOR_BYTES / static_cast<int>(sizeof(Real));

template <class Real>
TA_INLINE Vec<Real> load(const Real* p) {
  return *reinterpret_cast<const typename VecTypes<Real>::Unaligned*>(p);
}
template <class Real>
TA_INLINE void store(Real* p, Vec<Real> v) {
  *reinterpret_cast<typename VecTypes<Real>::Unaligned*>(p) = v;
}
template <class Real>
TA_INLINE Vec<Real> splat(Real x) {
  return x - Vec<Real>{};
}
template <class Real>
TA_INLINE IntVec<Real> splat_int(int64_t x) {
  return static_cast<typename VecTypes<Real>::IntElement>(x) - IntVec<Real>{};
}

// 0, 1, 2, … as integers.
template <class Real>
TA_INLINE IntVec<Real> lane_numbers() {
  IntVec<Real> numbers{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Real>; ++i) numbers[i] = i;
  return numbers;
}

template <class Real>
TA_INLINE Real sum_of_lanes(Vec<Real> v) {
  // Halves onto halves: additions from lane to lane are a chain, and took half of a short row's dot.
#pragma GCC unroll 4
  for (int half = kLanes<Real> / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane_numbers<Real>() ^ half);
  return v[0];
}

// The larger one; b where either is NaN. The instruction does this, but GCC 12 makes a compare and a blend of
// `a > b ? a : b`.
TA_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
TA_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#elif defined(__x86_64__)
  return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// The lanes in which a comparison holds, as bits.
TA_INLINE unsigned lane_bits(IntVec<float> comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)comparison));
#elif defined(__x86_64__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)comparison));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= (comparison[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}
TA_INLINE unsigned lane_bits(IntVec<double> comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)comparison));
#elif defined(__x86_64__)
  return static_cast<unsigned>(_mm_movemask_pd((__m128d)comparison));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= (comparison[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}

// The 64-bit products of the lower halves of 64-bit lanes with a 32-bit number.
typedef uint64_t WideVec __attribute__((vector_size(TA_VECTOR_BYTES)));
TA_INLINE WideVec multiply_low_halves(WideVec a, uint32_t b) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (WideVec)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
}

// The two halves of a[0], b[0], a[1], b[1], …
template <class Real, int... kLane>
TA_INLINE void interleave(Vec<Real> a, Vec<Real> b, Vec<Real>& low, Vec<Real>& high) {
  constexpr int n = kLanes<Real>;
  IntVec<Real> low_index{}, high_index{};
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    low_index[i] = (i & 1) * n + i / 2;
    high_index[i] = (i & 1) * n + i / 2 + n / 2;
  }
  low = __builtin_shuffle(a, b, low_index);
  high = __builtin_shuffle(a, b, high_index);
}

// rows[i][j] becomes rows[j][i].
template <class Real>
TA_INLINE void transpose_in_registers(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int n = kLanes<Real>;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Vec<Real> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) interleave<Real>(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

template <class T>
TA_INLINE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
TA_INLINE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
TA_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
TA_INLINE int64_t round_down(int64_t x, int64_t multiple) { return x / multiple * multiple; }

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
