// Philox on all lanes of a vector at once (core/dropout.h). Included by dropout_tile.h and noise_tile.h.
#pragma once

#include "../core/dropout.h"
#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

TA_INLINE WideVec xor_of(WideVec a, WideVec b, WideVec c) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// One round for the counters of a vector, one per 64-bit lane. Only the lower half of each lane counts; upper halves
// hold leftovers that the multiplication ignores.
TA_INLINE void philox_round(WideVec (&counter)[4], WideVec key0, WideVec key1) {
  const WideVec product0 = multiply_low_halves(counter[0], Philox4x32::kMultiplier0);
  const WideVec product1 = multiply_low_halves(counter[2], Philox4x32::kMultiplier1);
  counter[0] = xor_of(product1 >> 32, counter[1], key0);
  counter[1] = product1;
  counter[2] = xor_of(product0 >> 32, counter[3], key1);
  counter[3] = product0;
}

// The two words of a seed that Philox's round number `round` takes.
TA_INLINE uint32_t philox_key0(uint64_t seed, int round) {
  return static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * Philox4x32::kWeyl0;
}
TA_INLINE uint32_t philox_key1(uint64_t seed, int round) {
  return static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * Philox4x32::kWeyl1;
}

// The words of rows step apart, one per 64-bit lane, where first is the counter of the first row.
template <int kRounds>
TA_INLINE void philox_of_rows(const Philox4x32::Words& first, uint64_t seed, int64_t step, WideVec (&words)[4]) {
  WideVec rows;
  for (int i = 0; i < kLanes<double>; ++i) rows[i] = first.word[1] + static_cast<uint64_t>(i * step);
  words[0] = WideVec{} + first.word[0];
  words[1] = rows;
  words[2] = WideVec{} + first.word[2];
  words[3] = WideVec{} + first.word[3];
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    philox_round(words, WideVec{} + philox_key0(seed, round), WideVec{} + philox_key1(seed, round));
  }
}

// The four words of neighbouring rows, one row per lane of Real. Word 1 of the counter is the row.
template <class Real, int kRounds>
struct RowWords;

template <int kRounds>
struct RowWords<double, kRounds> {
  WideVec words[4];
  TA_INLINE RowWords(const Philox4x32::Words& first, uint64_t seed) { philox_of_rows<kRounds>(first, seed, 1, words); }
  TA_INLINE VecTypes<double>::Unsigned word(int j) const { return words[j] & 0xFFFFFFFFu; }
};

template <int kRounds>
struct RowWords<float, kRounds> {
  WideVec even[4], odd[4];
  TA_INLINE RowWords(const Philox4x32::Words& first, uint64_t seed) {
    const Philox4x32::Words second = {{first.word[0], first.word[1] + 1, first.word[2], first.word[3]}};
    philox_of_rows<kRounds>(first, seed, 2, even);
    philox_of_rows<kRounds>(second, seed, 2, odd);
  }
  TA_INLINE VecTypes<float>::Unsigned word(int j) const {
    return (VecTypes<float>::Unsigned)((even[j] & 0xFFFFFFFFu) | (odd[j] << 32));
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
