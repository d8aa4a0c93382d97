// Philox on all lanes of a vector at once, and the dropout factors of a tile of weights by it (core/dropout.h).
// Included by forward.h, backward.h and noise_tile.h.
#pragma once

#include "../core/dropout.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Philox on one row per 64-bit lane. Only the lower half of each lane counts; upper halves hold leftovers that the
// multiplication ignores.
TA_INLINE void philox(WideVec (&counter)[4], uint32_t key0, uint32_t key1) {
#pragma GCC unroll 10
  for (int round = 0; round < Philox4x32::kRounds; ++round) {
    const WideVec product0 = multiply_low_halves(counter[0], Philox4x32::kMultiplier0);
    const WideVec product1 = multiply_low_halves(counter[2], Philox4x32::kMultiplier1);
    counter[0] = (product1 >> 32) ^ counter[1] ^ uint64_t { key0 };
    counter[1] = product1;
    counter[2] = (product0 >> 32) ^ counter[3] ^ uint64_t { key1 };
    counter[3] = product0;
    key0 += Philox4x32::kWeyl0;
    key1 += Philox4x32::kWeyl1;
  }
}

// The words of rows step apart, one per 64-bit lane, where first is the counter of the first row.
TA_INLINE void philox_of_rows(const Philox4x32::Words& first, uint64_t seed, int64_t step, WideVec (&words)[4]) {
  WideVec rows;
  for (int i = 0; i < kLanes<double>; ++i) rows[i] = first.word[1] + static_cast<uint64_t>(i * step);
  words[0] = WideVec{} + first.word[0];
  words[1] = rows;
  words[2] = WideVec{} + first.word[2];
  words[3] = WideVec{} + first.word[3];
  philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The four words of neighbouring rows, one row per lane of Real. Word 1 of the counter is the row, in every use of it.
template <class Real>
struct RowWords;

template <>
struct RowWords<double> {
  WideVec words[4];
  TA_INLINE RowWords(const Philox4x32::Words& first, uint64_t seed) { philox_of_rows(first, seed, 1, words); }
  TA_INLINE VecTypes<double>::Unsigned word(int j) const { return words[j] & 0xFFFFFFFFu; }
};

template <>
struct RowWords<float> {
  WideVec even[4], odd[4];
  TA_INLINE RowWords(const Philox4x32::Words& first, uint64_t seed) {
    const Philox4x32::Words second = {{first.word[0], first.word[1] + 1, first.word[2], first.word[3]}};
    philox_of_rows(first, seed, 2, even);
    philox_of_rows(second, seed, 2, odd);
  }
  TA_INLINE VecTypes<float>::Unsigned word(int j) const {
    return (VecTypes<float>::Unsigned)((even[j] & 0xFFFFFFFFu) | (odd[j] << 32));
  }
};

// out[i][lane] = keep_scale or 0 for keys [key, key + keys) and the rows row + lane.
template <class Real, int kVectors>
TA_NOINLINE void dropout_tile(const Dropout& dropout, Real keep_scale, int64_t batch_head, int64_t row, int64_t key,
                              int64_t keys, Real* out) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  const typename VecTypes<Real>::Unsigned threshold = typename VecTypes<Real>::Unsigned{} + dropout.threshold;
  for (int64_t group = round_down(key, Dropout::kKeysPerCall); group < key + keys; group += Dropout::kKeysPerCall) {
    for (int n = 0; n < kVectors; ++n) {
      const RowWords<Real> words(dropout.counter(batch_head, row + n * n_lanes, group), dropout.seed);
#pragma GCC unroll 4
      for (int j = 0; j < Dropout::kKeysPerCall; ++j) {
        const int64_t i = group + j - key;
        if (i < 0 || i >= keys) continue;
        store(out + i * width + n * n_lanes, words.word(j) >= threshold ? splat(keep_scale) : splat(Real{0}));
      }
    }
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
