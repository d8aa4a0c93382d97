// Which weights of a tile dropout keeps (core/dropout.h), for lanes that are rows. Included by forward.h,
// gradient_tile.h and what is made of them.
//
// A 64-bit lane makes the call of an even and an odd row, which are its halves in the end: a vector of words has a row
// in each 32-bit lane and two keys in each word. What bounds this stage is instructions on the ports that the products
// use. Of the seven rounds, the first two depend on either the row or the key, and half of the third does: for four
// keys of a vector of rows, 29 instructions (AVX2, which xors in pairs: 36) and 6 comparisons and shifts are left.
#pragma once

#include "panel.h"
#include "philox.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The lanes of a vector of weights that are kept: a bit each, or all bits of a lane.
template <class Real>
struct Kept {
#if defined(__AVX512F__)
  uint16_t lanes;
#else
  typename VecTypes<Real>::IntElement lanes[kLanes<Real>];
#endif
};

#if defined(__AVX512F__)
TA_INLINE Vec<float> kept_of(Vec<float> x, const Kept<float>& kept) { return _mm512_maskz_mov_ps(kept.lanes, x); }
TA_INLINE Vec<double> kept_of(Vec<double> x, const Kept<double>& kept) {
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(kept.lanes), x);
}
// kept_of(x, kept) · scale
TA_INLINE Vec<float> kept_of(Vec<float> x, const Kept<float>& kept, float scale) {
  return _mm512_maskz_mul_ps(kept.lanes, x, splat(scale));
}
TA_INLINE Vec<double> kept_of(Vec<double> x, const Kept<double>& kept, double scale) {
  return _mm512_maskz_mul_pd(static_cast<__mmask8>(kept.lanes), x, splat(scale));
}
#else
template <class Real>
TA_INLINE Vec<Real> kept_of(Vec<Real> x, const Kept<Real>& kept) {
  return (Vec<Real>)((IntVec<Real>)x & (IntVec<Real>)load(reinterpret_cast<const Real*>(kept.lanes)));
}
template <class Real>
TA_INLINE Vec<Real> kept_of(Vec<Real> x, const Kept<Real>& kept, Real scale) {
  return kept_of(x, kept) * scale;
}
#endif

// A tile of them, and what the kept weights are multiplied by. kept[key · vectors + vector]; null without dropout.
template <class Real>
struct KeptTile {
  const Kept<Real>* kept = nullptr;
  Real scale = 1;
};

// Where words, of rows by 32-bit lanes, are above limit: those of one vector of float, or of two of double, of which
// only the first may be wanted.
TA_INLINE void store_kept(VecTypes<float>::Int words, VecTypes<float>::Int limit, bool, Kept<float>* out) {
#if defined(__AVX512F__)
  // Volatile, or GCC collects two vectors' bits in general registers for one store, which costs more.
  volatile uint16_t& lanes = out->lanes;
  lanes = _mm512_cmpgt_epi32_mask((__m512i)words, (__m512i)limit);
#else
  store(reinterpret_cast<float*>(out->lanes), (Vec<float>)(words > limit));
#endif
}
TA_INLINE void store_kept(VecTypes<float>::Int words, VecTypes<float>::Int limit, bool both, Kept<double>* out) {
#if defined(__AVX512F__)
  const __mmask16 lanes = _mm512_cmpgt_epi32_mask((__m512i)words, (__m512i)limit);
  out->lanes = lanes & 0xFF;
  if (both) out[1].lanes = static_cast<uint16_t>(lanes >> 8);
#else
  const VecTypes<float>::Int lanes = words > limit;
  for (int i = 0; i < kLanes<double>; ++i) out->lanes[i] = lanes[i];
  if (!both) return;
  for (int i = 0; i < kLanes<double>; ++i) out[1].lanes[i] = lanes[kLanes<double> + i];
#endif
}

constexpr int kMostDropoutKeys = 128;  // of a tile

// Philox for a panel of rows with one group of four keys after the other, all of one (batch, head).
class PhiloxPanel {
 public:
  // What rows contribute to the calls: words 2 (without the group's) and 3 after round 2.
  struct Rows {
    WideVec word2, word3;
  };
  // What groups contribute: what is xored to words in rounds 2, 3 and 4, with the rounds' keys.
  struct Groups {
    static constexpr int kMost = (kMostDropoutKeys / Dropout::kKeysPerCall / kLanes<double> + 1) *
                                 kLanes<double>;  // one more, as keys may start within one
    uint64_t round2_word2[kMost], round3_word0[kMost], round3_word2[kMost], round4_word2[kMost];
  };

  TA_INLINE PhiloxPanel(const Dropout& dropout, int64_t batch_head) {
    for (int round = 0; round < Dropout::kRounds; ++round) {
      keys_[round][0] = WideVec{} + philox_key0(dropout.seed, round);
      keys_[round][1] = WideVec{} + philox_key1(dropout.seed, round);
    }
    const auto counter = dropout.counter(batch_head, 0, 0);
    const WideVec product1 = multiply_low_halves(WideVec{} + counter.word[2], Philox4x32::kMultiplier1);
    round1_word0_ = (product1 >> 32) ^ keys_[0][0];
    round1_word1_ = product1;
    round1_word2_ = (WideVec{} + counter.word[3]) ^ keys_[0][1];
  }

  TA_INLINE Rows rows(int64_t first_row) const {
    const WideVec word0 = consecutive(first_row / Dropout::kRowsPerCall) ^ round1_word0_;
    const WideVec product0 = multiply_low_halves(word0, Philox4x32::kMultiplier0);
    return {product0 >> 32, product0};
  }

  TA_INLINE void groups(int64_t first_group, int64_t count, Groups& out) const {
    for (int64_t i = 0; i < count; i += kLanes<double>) {
      const WideVec round1 = multiply_low_halves(consecutive(first_group + i), Philox4x32::kMultiplier0);
      const WideVec round2 = multiply_low_halves((round1 >> 32) ^ round1_word2_, Philox4x32::kMultiplier1);
      const WideVec round3 =
          multiply_low_halves((round2 >> 32) ^ round1_word1_ ^ keys_[1][0], Philox4x32::kMultiplier0);
      store_wide(out.round2_word2 + i, round1 ^ keys_[1][1]);
      store_wide(out.round3_word0 + i, round2 ^ keys_[2][0]);
      store_wide(out.round3_word2 + i, (round3 >> 32) ^ keys_[2][1]);
      store_wide(out.round4_word2 + i, round3 ^ keys_[3][1]);
    }
  }

  // The calls of kCount vectors of rows with group i. Words 1 and 0, and words 3 and 2: each a lower and an upper half.
  // Side by side, as a call is a chain of instructions longer than what a core looks ahead.
  template <int kCount>
  TA_INLINE void words(const Rows* rows, const Groups& groups, int64_t i, WideVec (&first)[kCount],
                       WideVec (&second)[kCount]) const {
    static_assert(Dropout::kRounds == 7);
    WideVec counter[kCount][4];
    const auto each = [&](const auto& step) TA_INLINE_LAMBDA {
#pragma GCC unroll 3
      for (int n = 0; n < kCount; ++n) step(n, counter[n]);
    };
    each([&](int n, WideVec(&c)[4]) TA_INLINE_LAMBDA {  // round 3
      c[1] = multiply_low_halves(rows[n].word2 ^ groups.round2_word2[i], Philox4x32::kMultiplier1);
      c[0] = (c[1] >> 32) ^ groups.round3_word0[i];
      c[2] = rows[n].word3 ^ groups.round3_word2[i];
    });
    each([&](int, WideVec(&c)[4]) TA_INLINE_LAMBDA {
      const WideVec product0 = multiply_low_halves(c[0], Philox4x32::kMultiplier0);
      const WideVec product1 = multiply_low_halves(c[2], Philox4x32::kMultiplier1);
      c[0] = xor_of(product1 >> 32, c[1], keys_[3][0]);
      c[1] = product1;
      c[2] = (product0 >> 32) ^ groups.round4_word2[i];
      c[3] = product0;
    });
#pragma GCC unroll 2
    for (int round = 4; round < 6; ++round) {
      each([&](int, WideVec(&c)[4]) TA_INLINE_LAMBDA { philox_round(c, keys_[round][0], keys_[round][1]); });
    }
    each([&](int n, WideVec(&c)[4]) TA_INLINE_LAMBDA {
      const WideVec product0 = multiply_low_halves(c[0], Philox4x32::kMultiplier0);
      const WideVec product1 = multiply_low_halves(c[2], Philox4x32::kMultiplier1);
      first[n] = xor_of(product1, c[1] << 32, keys_[6][0] << 32);
      second[n] = xor_of(product0, c[3] << 32, keys_[6][1] << 32);
    });
  }

 private:
  static TA_INLINE WideVec consecutive(int64_t first) {
    return (WideVec)(splat_int<double>(first) + lane_numbers<double>());
  }
  static TA_INLINE void store_wide(uint64_t* out, WideVec v) { store(reinterpret_cast<double*>(out), (Vec<double>)v); }

  WideVec keys_[Dropout::kRounds][2];
  WideVec round1_word0_, round1_word1_, round1_word2_;  // without the row and the group
};

// out[i · kVectors + n] says what is kept of key `key` + i and the rows of vector n, which are those from `row` on; row
// is even.
template <class Real, int kVectors>
TA_NOINLINE void dropout_tile(const Dropout& dropout, int64_t batch_head, int64_t row, int64_t key, int64_t keys,
                              Kept<Real>* out) {
  using Words = VecTypes<float>::Int;
  constexpr int kStep = sizeof(Real) / sizeof(float);  // vectors of Real that a vector of words covers
  const PhiloxPanel philox(dropout, batch_head);
  const int64_t first_group = round_down(key, Dropout::kKeysPerCall), shift = key - first_group;
  const int64_t count = (shift + keys + Dropout::kKeysPerCall - 1) / Dropout::kKeysPerCall;
  PhiloxPanel::Groups groups;
  philox.groups(first_group / Dropout::kKeysPerCall, count, groups);
  const Words limit = splat_int<float>(dropout.limit);
  constexpr int kSets = (kVectors + kStep - 1) / kStep;
  PhiloxPanel::Rows rows[kSets];
#pragma GCC unroll 3
  for (int n = 0; n < kSets; ++n) rows[n] = philox.rows(row + n * kStep * kLanes<Real>);
  const auto add_group = [&](int64_t i, bool whole) TA_INLINE_LAMBDA {
    WideVec first[kSets], second[kSets];
    philox.words<kSets>(rows, groups, i, first, second);
#pragma GCC unroll 3
    for (int n = 0; n < kSets; ++n) {
      const Words words[] = {(Words)first[n] << 16, (Words)first[n], (Words)second[n] << 16, (Words)second[n]};
#pragma GCC unroll 4
      for (int j = 0; j < Dropout::kKeysPerCall; ++j) {
        const int64_t place = i * Dropout::kKeysPerCall + j - shift;
        if (!whole && (place < 0 || place >= keys)) continue;
        store_kept(words[j], limit, n * kStep + 1 < kVectors, out + place * kVectors + n * kStep);
      }
    }
  };
  const int64_t whole_begin = shift == 0 ? 0 : 1, whole_end = (shift + keys) / Dropout::kKeysPerCall;
  if (shift != 0) add_group(0, false);
  for (int64_t i = whole_begin; i < whole_end; ++i) add_group(i, true);
  if (whole_end < count && whole_end >= whole_begin) add_group(whole_end, false);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
