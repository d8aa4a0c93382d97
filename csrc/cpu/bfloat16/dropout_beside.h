// What dropout drops of a tile of weights, done beside tile products. Included by forward_stages.h and softmax_pairs.h.
#pragma once

#include "../dropout_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// KeptTile's words of kAmxLanes rows from `row` on, which is even, and `count` groups of eight keys. Of these, each
// step of one 2 × 2 block of products takes kParts, for one vector of rows.
template <int kParts>
class DropoutBeside {
 public:
  TA_INLINE DropoutBeside(const PhiloxPanel& philox, const PhiloxPanel::Groups& groups, int64_t row,
                          int64_t first_group, int64_t count, uint32_t* words)
      : philox_(philox), groups_(groups), next_(first_group), end_(first_group + count), words_(words) {
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) rows_[n] = philox_.rows(row + n * kLanes<float>);
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    add_parts<parts_before(kSlot, kSlots, kParts), parts_before(kSlot + 1, kSlots, kParts)>();
  }
  TA_INLINE void finish() {
    while (next_ < end_) add_parts<0, kAmxVectors>();
  }

 private:
  static constexpr int64_t kWords = kAmxLanes * (Dropout::kKeysPerCall / Dropout::kKeysPerWord);  // of a group

  template <int kFirst, int kLast>
  TA_INLINE void add_parts() {
    if constexpr (kFirst < kLast) {
      constexpr int n = kFirst % kAmxVectors;
      if (next_ < end_) philox_.drop<1>(rows_ + n, groups_, next_, words_ + n * kLanes<float>, kAmxLanes);
      if constexpr (n == kAmxVectors - 1) {
        ++next_;
        words_ += kWords;
      }
      add_parts<kFirst + 1, kLast>();
    }
  }

  const PhiloxPanel& philox_;
  const PhiloxPanel::Groups& groups_;
  PhiloxPanel::Rows rows_[kAmxVectors];
  int64_t next_, end_;
  uint32_t* words_;
};

// Of pair 0 or 1 of a word's four keys: bit 2 · lane + key % 2 of what is kept, as in the pairs of a B operand.
template <int kPair>
TA_INLINE uint32_t kept_pairs(const uint32_t* words) {
  return _mm512_testn_epi16_mask(_mm512_loadu_si512(words), _mm512_set1_epi16(static_cast<int16_t>(0xFF << 8 * kPair)));
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
