// attn_mask on a panel's scores where nothing else changes them: in the pass that also takes their maximum, so that
// neither a tile of the mask nor a second pass over the scores is needed. What this file does not serve (see
// MaskedPanel::serves) goes through ../score_tile.h. Included by forward.h and walk.h.
#pragma once

#include "../score_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Numbers 2i and 2i + 1 of 16 rows, in pairs, as two vectors.
TA_INLINE void split_pairs(BFloat16, Vec<float> pairs, Vec<float>& even, Vec<float>& odd) {
  const auto bits = (typename VecTypes<float>::Unsigned)pairs;
  even = (Vec<float>)(bits << 16);
  odd = (Vec<float>)(bits & 0xFFFF0000u);
}
TA_INLINE void split_pairs(Float16, Vec<float> pairs, Vec<float>& even, Vec<float>& odd) {
  HalfVec order{};
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i < 16 ? 2 * i : 2 * (i - 16) + 1);
  const __m512i apart = _mm512_permutexvar_epi16((__m512i)order, (__m512i)pairs);
  even = _mm512_cvtph_ps(_mm512_castsi512_si256(apart));
  odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(apart, 1));
}

// Calls visit(key, its 16 rows' numbers) for 64 bytes of 16 rows.
template <class Stored, class Visit>
TA_INLINE void visit_square(const char* first, int64_t row_stride, const Visit& visit) {
  Quarters(first, row_stride).for_each_column([&](int i, Vec<float> column) TA_INLINE_LAMBDA {
    if constexpr (sizeof(Stored) == 4) {
      visit(i, column);
    } else {
      Vec<float> even, odd;
      split_pairs(Stored{}, column, even, odd);
      visit(2 * i, even);
      visit(2 * i + 1, odd);
    }
  });
}

// Scores, divided by factor, become scores with a floating mask, whose element for the panel's first row and key begin
// is first; maximum[lane] is raised to include them, with kMaximum. between is called after each square.
template <class Stored, bool kMaximum, class Between>
TA_NOINLINE void add_mask(const char* first, int64_t row_stride, int64_t begin, int64_t end, float factor,
                          float* scores, float* maximum, const Between& between) {
  constexpr int n_lanes = kLanes<float>, kKeys = 64 / static_cast<int>(sizeof(Stored));
#pragma GCC unroll 1
  for (int n = 0; n < kAmxVectors; ++n) {
    const char* rows = first + n * n_lanes * row_stride;
    Vec<float> highest[2] = {};
    if constexpr (kMaximum) highest[0] = highest[1] = load(maximum + n * n_lanes);
    for (int64_t j = begin; j < end; j += kKeys, rows += 64) {
      float* tile = scores + j * kAmxLanes + n * n_lanes;
      visit_square<Stored>(rows, row_stride, [&](int k, Vec<float> added) TA_INLINE_LAMBDA {
        float* place = tile + k * kAmxLanes;
        const Vec<float> score = VectorMath<float>::add_to_score(load(place) * factor, added);
        store(place, score);
        if constexpr (kMaximum) highest[k & 1] = max(highest[k & 1], score);
      });
      between();
    }
    if constexpr (kMaximum) store(maximum + n * n_lanes, max(highest[0], highest[1]));
  }
}

// Whether a floating mask is −∞ in all of a panel's rows and so many keys. Ends at the first other number: nearly every
// tile's first.
template <class Stored>
TA_NOINLINE bool excludes_all(const char* first, int64_t row_stride, int64_t keys) {
  for (int64_t i = 0; i < kAmxLanes; ++i) {
    const auto* row = reinterpret_cast<const Stored*>(first + i * row_stride);
    for (int64_t j = 0; j < keys; j += kLanes<float>) {
      const Vec<float> negative_infinity = splat(-__builtin_inff());
      if (_mm512_cmp_ps_mask(load_as(row + j), negative_infinity, _CMP_NEQ_UQ) != 0) return false;
    }
  }
  return true;
}

// A boolean mask's bits for a panel: words[key / 32][lane], bit key % 32, counted from the panel's first key.
using AttendedWords = uint32_t[kAmxKeys / 32][kAmxLanes];

enum class MaskEffect { kNone, kSome, kExcludesAll };

// keys is a multiple of 32.
TA_NOINLINE inline MaskEffect load_attended_words(const char* first, int64_t row_stride, int64_t keys,
                                                  AttendedWords& words) {
  __m512i any = _mm512_setzero_si512(), every = _mm512_set1_epi32(-1);
  const auto put = [&](int64_t key, int64_t lane, __m512i bits) TA_INLINE_LAMBDA {
    _mm512_storeu_si512(&words[key / 32][lane], bits);
    any = _mm512_or_si512(any, bits);
    every = _mm512_and_si512(every, bits);
  };
  for (int64_t key = 0; key < keys; key += 64) {
    const bool half = keys - key < 64;
    const __mmask64 wanted = half ? 0xFFFFFFFFu : ~uint64_t{0};
    alignas(64) uint64_t bits[kAmxLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kAmxLanes; ++i) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(wanted, first + i * row_stride + key);
      bits[i] = _cvtmask64_u64(_mm512_test_epi8_mask(bytes, bytes));
    }
    typename VecTypes<float>::Int low{}, high{};
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) low[i] = 2 * i, high[i] = 2 * i + 1;
#pragma GCC unroll 2
    for (int64_t lane = 0; lane < kAmxLanes; lane += 16) {
      const __m512i a = _mm512_load_si512(bits + lane), b = _mm512_load_si512(bits + lane + 8);
      put(key, lane, _mm512_permutex2var_epi32(a, (__m512i)low, b));
      if (!half) put(key + 32, lane, _mm512_permutex2var_epi32(a, (__m512i)high, b));
    }
  }
  if (_mm512_test_epi32_mask(any, any) == 0) return MaskEffect::kExcludesAll;
  const bool all = _mm512_cmpneq_epi32_mask(every, _mm512_set1_epi32(-1)) == 0;
  return all ? MaskEffect::kNone : MaskEffect::kSome;
}

// The scores that a boolean mask excludes become −∞; with kMaximum, raise_maximum in the same pass.
template <bool kMaximum>
TA_NOINLINE void keep_attended(const AttendedWords& words, int64_t begin, int64_t end, float factor, float* scores,
                               float* maximum) {
  constexpr int n_lanes = kLanes<float>;
  const Vec<float> nothing = splat(-__builtin_inff());
  Vec<float> highest[2][kAmxVectors] = {{nothing, nothing}, {nothing, nothing}};
  for (int64_t first = begin; first < end; first += 32) {
    __m512i lanes[kAmxVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) lanes[n] = _mm512_loadu_si512(&words[(first - begin) / 32][n * n_lanes]);
    __m512i bit = _mm512_set1_epi32(1);
    for (int64_t j = first; j < first + 32; j += 2) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
        for (int n = 0; n < kAmxVectors; ++n) {
          float* place = scores + (j + i) * kAmxLanes + n * n_lanes;
          const __mmask16 attended = _mm512_test_epi32_mask(lanes[n], bit);
          const Vec<float> score = _mm512_mask_loadu_ps(nothing, attended, place);
          store(place, score);
          if constexpr (kMaximum) highest[i][n] = max(highest[i][n], score);
        }
        bit = _mm512_add_epi32(bit, bit);
      }
    }
  }
  if constexpr (!kMaximum) return;
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) {
    float* place = maximum + n * n_lanes;
    store(place, max(load(place), max(highest[0][n], highest[1][n]) * factor));
  }
}

// The mask of one panel and the keys of one span, which it changes alone.
class MaskedPanel {
 public:
  // Whole panels and tiles of a mask whose rows are contiguous.
  static TA_INLINE bool serves(const ScoreStage<float>& stage, int64_t rows, const KeySpan& span) {
    return stage.mask && !stage.softcap && !stage.alibi && !span.has_edges() && rows == kAmxLanes &&
           stage.mask_rows.row_stride != 0 && stage.mask_rows.column_stride == 1 &&
           stage.mask_rows.dtype != ScalarType::kFloat64 && stage.dot_factor() > 0;
  }

  // The mask from the panel's first row and span's first key on.
  MaskEffect load(const MaskRows& mask, int64_t row, int64_t key, const KeySpan& span) {
    first_ = mask.at(row, key + span.begin);
    row_stride_ = mask.row_stride;
    dtype_ = mask.dtype;
    const int64_t keys = span.end - span.begin;
    const auto effect = [&](bool excludes) { return excludes ? MaskEffect::kExcludesAll : MaskEffect::kSome; };
    switch (dtype_) {
      case ScalarType::kBool:
        return load_attended_words(first_, row_stride_, keys, words_);
      case ScalarType::kBFloat16:
        return effect(excludes_all<BFloat16>(first_, row_stride_, keys));
      case ScalarType::kFloat16:
        return effect(excludes_all<Float16>(first_, row_stride_, keys));
      default:
        return effect(excludes_all<float>(first_, row_stride_, keys));
    }
  }

  // How often apply calls between.
  int64_t squares(const KeySpan& span) const {
    if (dtype_ == ScalarType::kBool) return 0;
    return kAmxVectors * (span.end - span.begin) * element_size(dtype_) / 64;
  }

  // Scores, divided by factor, become those with the mask; with kMaximum, maximum is raised to include them. Returns
  // what the scores are divided by then.
  template <bool kMaximum, class Between>
  float apply(const KeySpan& span, float factor, float* scores, float* maximum, const Between& between) const {
    const auto add = [&]<class Stored>() {
      add_mask<Stored, kMaximum>(first_, row_stride_, span.begin, span.end, factor, scores, maximum, between);
      return 1.0f;
    };
    switch (dtype_) {
      case ScalarType::kBool:
        keep_attended<kMaximum>(words_, span.begin, span.end, factor, scores, maximum);
        return factor;
      case ScalarType::kBFloat16:
        return add.template operator()<BFloat16>();
      case ScalarType::kFloat16:
        return add.template operator()<Float16>();
      default:
        return add.template operator()<float>();
    }
  }

 private:
  const char* first_ = nullptr;
  int64_t row_stride_ = 0;
  ScalarType dtype_ = ScalarType::kBool;
  alignas(64) AttendedWords words_;
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
