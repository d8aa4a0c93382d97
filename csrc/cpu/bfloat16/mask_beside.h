// What a mask does to a panel's scores, cut into parts that run beside the product of another panel (see amx_tiles.h),
// and finished after it. Included by masked_scores.h.
#pragma once

#include "../mask_tile.h"
#include "../math.h"
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

// Scores of keys [begin, end), divided by factor, become scores with a floating mask; with kMaximum, maximum[lane] is
// raised to include them. The mask is read in squares, 64 bytes of 16 rows, in eight parts each: four bring rows into
// staging, as Quarters has them, and ask for the same rows of the next tile, which is `ahead` bytes away; four add
// them. Each step of one 2 × 2 block of products takes kSquares.
template <class Stored, bool kMaximum, int kSquares>
class AddedBeside {
 public:
  // first: the mask's element for the panel's first row and key begin. staging: 16 vectors.
  TA_INLINE AddedBeside(const char* first, int64_t row_stride, int64_t ahead, int64_t begin, int64_t end, float factor,
                        float* scores, float* maximum, float* staging)
      : first_(first),
        row_stride_(row_stride),
        ahead_(ahead),
        factor_(factor),
        scores_(scores + begin * kAmxLanes),
        maximum_(maximum),
        staging_(staging),
        squares_(kAmxVectors * ((end - begin) / kKeys)) {
    find_square();
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    constexpr int kParts = 8 * kSquares;
    do_parts<parts_before(kSlot, kSlots, kParts), parts_before(kSlot + 1, kSlots, kParts)>();
  }
  // between is called after each square.
  template <class Between>
  TA_INLINE void finish(const Between& between) {
    while (square_ < squares_) {
      do_parts<0, 8>();
      between();
    }
  }

 private:
  static constexpr int kKeys = 64 / static_cast<int>(sizeof(Stored));
  static constexpr int n_lanes = kLanes<float>;

  template <int kFirst, int kLast>
  TA_INLINE void do_parts() {
    if constexpr (kFirst < kLast) {
      constexpr int kPart = kFirst % 8;
      if (square_ < squares_) {
        if constexpr (kPart < 4) {
          stage<kPart>();
        } else {
          add<kPart - 4>();
        }
        if constexpr (kPart == 7) {
          ++square_;
          find_square();
        }
      }
      do_parts<kFirst + 1, kLast>();
    }
  }

  // Both halves of the lanes before the next keys.
  TA_INLINE void find_square() {
    static_assert(kAmxVectors == 2);
    const int64_t n = square_ & 1, j = square_ >> 1;
    place_ = first_ + n * n_lanes * row_stride_ + j * 64;
    tile_ = scores_ + j * kKeys * kAmxLanes + n * n_lanes;
  }

  template <int kRow>
  TA_INLINE void stage() {
    Vec<float> quarters[4];
    Quarters::load(place_ + kRow * row_stride_, 4 * row_stride_, quarters);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store(staging_ + (4 * c + kRow) * n_lanes, quarters[c]);
    const char* next = place_ + kRow * row_stride_ + ahead_;
    constexpr int kIntoL2 = 2;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) __builtin_prefetch(next + 4 * i * row_stride_, 0, kIntoL2);
  }

  template <int kQuarter>
  TA_INLINE void add() {
    Vec<float> rows[4], columns[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) rows[r] = load(staging_ + (4 * kQuarter + r) * n_lanes);
    Quarters::columns(rows, columns);
    float* highest_place = kMaximum ? maximum_ + (square_ & 1) * n_lanes : nullptr;
    Vec<float> highest{};
    if constexpr (kMaximum) highest = load(highest_place);
    const auto add_to = [&](int key, Vec<float> added) TA_INLINE_LAMBDA {
      float* place = tile_ + key * kAmxLanes;
      const Vec<float> score = VectorMath<float>::add_to_score(load(place) * factor_, added);
      store(place, score);
      if constexpr (kMaximum) highest = max(highest, score);
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int column = 4 * kQuarter + i;
      if constexpr (sizeof(Stored) == 4) {
        add_to(column, columns[i]);
      } else {
        Vec<float> even, odd;
        split_pairs(Stored{}, columns[i], even, odd);
        add_to(2 * column, even);
        add_to(2 * column + 1, odd);
      }
    }
    if constexpr (kMaximum) store(highest_place, highest);
  }

  const char* first_;
  int64_t row_stride_, ahead_;
  float factor_;
  float *scores_, *maximum_, *staging_;
  int64_t square_ = 0, squares_;
  const char* place_;
  float* tile_;
};

// The scores that a boolean mask excludes become −∞; with kMaximum, maximum[lane] is raised to include factor times the
// others. Each step of one 2 × 2 block of products takes kParts: pairs of keys.
template <bool kMaximum, int kParts>
class AttendedBeside {
 public:
  // bits: from key begin on, see attended_bits.h.
  TA_INLINE AttendedBeside(const uint32_t* bits, int64_t begin, int64_t end, float factor, float* scores,
                           float* maximum)
      : bits_(bits), scores_(scores + begin * kAmxLanes), maximum_(maximum), factor_(factor), end_(end - begin) {
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) highest_[0][n] = highest_[1][n] = splat(-__builtin_inff());
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    constexpr int kCount = parts_before(kSlot + 1, kSlots, kParts) - parts_before(kSlot, kSlots, kParts);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (key_ < end_) do_pair();
    }
  }
  template <class Between>
  TA_INLINE void finish(const Between& /*between*/) {
    while (key_ < end_) do_pair();
    if constexpr (!kMaximum) return;
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      float* place = maximum_ + n * kLanes<float>;
      store(place, max(load(place), max(highest_[0][n], highest_[1][n]) * factor_));
    }
  }

 private:
  TA_INLINE void do_pair() {
    const Vec<float> nothing = splat(-__builtin_inff());
    const auto* bits = reinterpret_cast<const char*>(bits_ + key_);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < kAmxVectors; ++n) {
        float* place = scores_ + (key_ + i) * kAmxLanes + n * kLanes<float>;
        __mmask16 attended;
        __builtin_memcpy(&attended, bits + 4 * i + 2 * n, sizeof attended);
        const Vec<float> score = _mm512_mask_loadu_ps(nothing, attended, place);
        store(place, score);
        if constexpr (kMaximum) highest_[i][n] = max(highest_[i][n], score);
      }
    }
    key_ += 2;
  }

  const uint32_t* bits_;
  float *scores_, *maximum_;
  float factor_;
  int64_t key_ = 0, end_;
  Vec<float> highest_[2][kAmxVectors];
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
