// Between the types in which tensors are stored and the accumulator type: rows in, rows out. The only code of the
// kernels that knows bfloat16 and float16. Included by pack.h and the score stage.
#pragma once

#include "../core/problem.h"
#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

TA_INLINE int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return 8;
    case ScalarType::kFloat32:
      return 4;
    case ScalarType::kBool:
      return 1;
    default:
      return 2;
  }
}

TA_INLINE float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
TA_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  TA_INLINE operator float() const { return float_from_bits(uint32_t{bits} << 16); }
  // Round to nearest even; a NaN stays one.
  static TA_INLINE BFloat16 from(float x) {
    const uint32_t bits = bits_of_float(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
  }
};

struct Float16 {
  uint16_t bits;
  // The exponent is rebiased by a multiplication, which also makes denormals normal.
  TA_INLINE operator float() const {
    const uint32_t magnitude = bits & 0x7FFFu, sign = uint32_t{bits & 0x8000u} << 16;
    const float rebiased = float_from_bits(magnitude << 13) * 0x1p112f;
    const uint32_t finite = bits_of_float(rebiased), special = (magnitude << 13) | 0x7F800000u;
    return float_from_bits(sign | (magnitude >= 0x7C00u ? special : finite));
  }
  // Round to nearest even: denormals by adding 0.5 (whose ulp is float16's smallest number), the others in integers.
  static TA_INLINE Float16 from(float x) {
    const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const uint32_t denormal = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;  // NaN : infinity, or too large for float16
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite))};
  }
};

// True (attend) adds nothing to a score, false adds −∞.
struct BoolBias {
  uint8_t attend;
  TA_INLINE operator float() const { return attend ? 0.0f : -__builtin_inff(); }
};

template <class Stored, class Real>
TA_INLINE void load_row_of(Real* __restrict out, const Stored* __restrict in, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(in[i * stride]);
  }
}

#if defined(__F16C__)
template <>
TA_INLINE void load_row_of(float* __restrict out, const Float16* __restrict in, int64_t stride, int64_t count) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    }
  }
  for (; i < count; ++i) out[i] = in[i * stride];
}
#endif

// One vector of stored elements, as accumulators.
TA_INLINE Vec<float> load_as(const float* p) { return load(p); }
TA_INLINE Vec<double> load_as(const double* p) { return load(p); }
TA_INLINE Vec<float> load_as(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                                       16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(TA_VECTOR_BYTES / 2)));
  typedef uint16_t HalfUnaligned __attribute__((vector_size(TA_VECTOR_BYTES / 2), aligned(2), may_alias));
  const Half bits = *reinterpret_cast<const HalfUnaligned*>(p);
  return (Vec<float>)(__builtin_convertvector(bits, VecTypes<float>::Unsigned) << 16);
#endif
}
TA_INLINE Vec<float> load_as(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = p[i];
  return v;
#endif
}

// out[i] = in[i · stride] for i in [0, count).
template <class Real>
TA_NOINLINE void load_row(Real* out, ScalarType dtype, const void* in, int64_t stride, int64_t count) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return load_row_of(out, static_cast<const double*>(in), stride, count);
    case ScalarType::kFloat32:
      return load_row_of(out, static_cast<const float*>(in), stride, count);
    case ScalarType::kBFloat16:
      return load_row_of(out, static_cast<const BFloat16*>(in), stride, count);
    case ScalarType::kFloat16:
      return load_row_of(out, static_cast<const Float16*>(in), stride, count);
    case ScalarType::kBool:
      return load_row_of(out, static_cast<const BoolBias*>(in), stride, count);
  }
}

// out[i] = in[i] for i in [0, count), rounded to nearest even.
template <class Real>
TA_NOINLINE void store_row(void* out, ScalarType dtype, const Real* __restrict in, int64_t count) {
  switch (dtype) {
    case ScalarType::kFloat64: {
      auto* __restrict row = static_cast<double*>(out);
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<double>(in[i]);
      return;
    }
    case ScalarType::kFloat32: {
      auto* __restrict row = static_cast<float*>(out);
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<float>(in[i]);
      return;
    }
    case ScalarType::kBFloat16: {
      auto* __restrict row = static_cast<BFloat16*>(out);
      for (int64_t i = 0; i < count; ++i) row[i] = BFloat16::from(static_cast<float>(in[i]));
      return;
    }
    case ScalarType::kFloat16: {
      auto* __restrict row = static_cast<Float16*>(out);
      for (int64_t i = 0; i < count; ++i) row[i] = Float16::from(static_cast<float>(in[i]));
      return;
    }
    case ScalarType::kBool:
      return;  // nothing is written as bool
  }
}

// The element (batch, head, row, 0) of a tensor, whose pages, if it is paged, are looked up here alone.
TA_INLINE char* element(const TensorView& view, int64_t batch, int64_t head, int64_t row) {
  if (view.pages != nullptr) {
    batch = view.pages[batch * view.pages_stride + row / view.page_rows];
    row %= view.page_rows;
  }
  const int64_t offset = batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
  return static_cast<char*>(view.data) + offset * element_size(view.dtype);
}

// Whether rows [row, row + rows) of one head are stride[2] apart.
TA_INLINE bool is_one_run(const TensorView& view, int64_t row, int64_t rows) {
  return view.pages == nullptr || row % view.page_rows + rows <= view.page_rows;
}

// Calls body(first, row, count) for each run of rows of [row, row + rows) that are stride[2] apart: the element that
// run starts with, its number, counted from row, and how many there are.
template <class Body>
TA_INLINE void for_each_run(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                            const Body& body) {
  if (is_one_run(view, row, rows)) return body(element(view, batch, head, row), int64_t{0}, rows);
  for (int64_t i = 0; i < rows;) {
    const int64_t left = view.page_rows - (row + i) % view.page_rows, count = left < rows - i ? left : rows - i;
    body(element(view, batch, head, row + i), i, count);
    i += count;
  }
}

// The number for (batch, head) of a tensor that has one per head.
template <class Real>
TA_INLINE Real head_number(const TensorView& view, int64_t batch, int64_t head) {
  return static_cast<const Real*>(view.data)[batch * view.stride[0] + head * view.stride[1]];
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
