// What dropout keeps of a tile of weights, in the layout of a B operand (tiles.h): neighbouring keys are neighbours, as
// they are in a word of core/dropout.h. So one comparison serves 32 weights. Included by bfloat16/forward.h.
#pragma once

#include "../dropout_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Bit 2 · lane + key % 2 of out[vector · kAmxKeys / 2 + pair of keys], for kAmxLanes rows from `row` on, which is even,
// and `count` groups of keys. Done in parts beside tile products, of which each step of one 2 × 2 block takes kParts
// groups.
template <int kParts>
class DropoutPairs {
 public:
  TA_INLINE DropoutPairs(const PhiloxPanel& philox, const PhiloxPanel::Groups& groups, int32_t limit, int64_t row,
                         int64_t first_group, int64_t count, uint32_t* out)
      : philox_(philox),
        groups_(groups),
        limit_(_mm512_set1_epi16(static_cast<int16_t>(limit >> 16))),
        count_(count),
        first_group_(first_group),
        out_(out) {
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) rows_[n] = philox_.rows(row + n * kLanes<float>);
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    if constexpr (parts_before(kSlot, kSlots, kParts) < parts_before(kSlot + 1, kSlots, kParts)) {
      if (done_ < count_) add_group();
    }
  }
  TA_INLINE void finish() {
    while (done_ < count_) add_group();
  }

 private:
  TA_INLINE void add_group() {
    WideVec first[kAmxVectors], second[kAmxVectors];
    philox_.words<kAmxVectors>(rows_, groups_, first_group_ + done_, first, second);
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      // Volatile, or GCC collects the bits in general registers for one store, which costs more.
      volatile uint32_t* pairs = out_ + n * (kAmxKeys / 2) + 2 * done_;
      pairs[0] = _mm512_cmpgt_epi16_mask((__m512i)first[n], limit_);
      pairs[1] = _mm512_cmpgt_epi16_mask((__m512i)second[n], limit_);
    }
    ++done_;
  }

  const PhiloxPanel& philox_;
  const PhiloxPanel::Groups& groups_;
  PhiloxPanel::Rows rows_[kAmxVectors];
  __m512i limit_;
  int64_t count_, first_group_, done_ = 0;
  uint32_t* out_;
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
