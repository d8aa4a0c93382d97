// Which weights of a tile dropout drops (core/dropout.h), for lanes that are rows. Included by forward.h,
// gradient_tile.h and what is made of them.
//
// A 64-bit lane makes the call of an even and an odd row, which are its halves in the end: a vector of words has a row
// in each 32-bit lane and four keys in each word. What bounds this stage is instructions on the ports that the products
// use. Of the seven rounds, the first two depend on either the row or the key, and half of the third does: for eight
// keys of a vector of rows, 29 instructions are left (AVX2, which xors in pairs: 36), and 5 that compare. Bytes are
// stored as they come, and become lanes where they are used: that takes one instruction, as loading a mask would.
#pragma once

#include "panel.h"
#include "philox.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The lanes of a vector of weights that are kept: a bit each, or all bits of those that are dropped.
template <class Real>
struct Kept {
#if defined(__AVX512F__)
  __mmask16 lanes;
#else
  IntVec<Real> dropped;
#endif
};

#if defined(__AVX512F__)
TA_INLINE Vec<float> kept_of(Vec<float> x, Kept<float> kept) { return _mm512_maskz_mov_ps(kept.lanes, x); }
TA_INLINE Vec<double> kept_of(Vec<double> x, Kept<double> kept) {
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(kept.lanes), x);
}
// kept_of(x, kept) · scale
TA_INLINE Vec<float> kept_of(Vec<float> x, Kept<float> kept, float scale) {
  return _mm512_maskz_mul_ps(kept.lanes, x, splat(scale));
}
TA_INLINE Vec<double> kept_of(Vec<double> x, Kept<double> kept, double scale) {
  return _mm512_maskz_mul_pd(static_cast<__mmask8>(kept.lanes), x, splat(scale));
}
#else
template <class Real>
TA_INLINE Vec<Real> kept_of(Vec<Real> x, Kept<Real> kept) {
  return (Vec<Real>)(~kept.dropped & (IntVec<Real>)x);
}
template <class Real>
TA_INLINE Vec<Real> kept_of(Vec<Real> x, Kept<Real> kept, Real scale) {
  return kept_of(x, kept) * scale;
}
#endif

// A word's byte for each key.
constexpr int32_t byte_of_key(int key) { return static_cast<int32_t>(0xFFu << 8 * Dropout::place_in_word(key)); }
constexpr int32_t kByteOfKey[] = {byte_of_key(0), byte_of_key(1), byte_of_key(2), byte_of_key(3)};
#if defined(__AVX2__) && !defined(__AVX512F__)
// The same as what a shuffle of bytes takes, which fills each word with that byte.
#define TA_PLACES(place)                                              \
  {place, 0x04040404 + place, 0x08080808 + place, 0x0C0C0C0C + place, \
   place, 0x04040404 + place, 0x08080808 + place, 0x0C0C0C0C + place}
alignas(32) constexpr int32_t kPlacesOfKey[4][8] = {TA_PLACES(0), TA_PLACES(0x02020202), TA_PLACES(0x01010101),
                                                    TA_PLACES(0x03030303)};
#undef TA_PLACES
#endif

// What a vector of words says of key % 4, whose byte is 0 where the weight of a row is kept; otherwise, but on AVX-512,
// it is 0xFF.
TA_INLINE void load_kept(const uint32_t* words, int key, Kept<float>& kept) {
#if defined(__AVX512F__)
  kept.lanes = _mm512_testn_epi32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(kByteOfKey[key]));
#elif defined(__AVX2__)
  const __m256i places = _mm256_load_si256((const __m256i*)kPlacesOfKey[key]);
  kept.dropped = (IntVec<float>)_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)words), places);
#else
  const IntVec<float> bytes = (IntVec<float>)load(reinterpret_cast<const float*>(words));
  kept.dropped = (bytes & kByteOfKey[key]) != 0;
#endif
}
TA_INLINE void load_kept(const uint32_t* words, int key, Kept<double>& kept) {
#if defined(__AVX512F__)
  const __m256i rows = _mm256_loadu_si256((const __m256i*)words);
  kept.lanes = _mm256_testn_epi32_mask(rows, _mm256_set1_epi32(kByteOfKey[key]));
#else
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<double>; ++i)
    kept.dropped[i] = (static_cast<int32_t>(words[i]) & kByteOfKey[key]) != 0 ? -1 : 0;
#endif
}

// The 32-bit words of a tile in kVectors vectors of Real.
template <class Real, int kVectors>
constexpr int64_t kDropoutRows = (kVectors * kLanes<Real> + kLanes<float> - 1) / kLanes<float> * kLanes<float>;

// How many words a tile of so many keys takes, wherever they start.
TA_INLINE constexpr int64_t dropout_words(int64_t keys, int64_t rows) {
  return (keys / Dropout::kKeysPerCall + 2) * (Dropout::kKeysPerCall / Dropout::kKeysPerWord) * rows;
}

// What dropout_tile has stored for a tile, and what the kept weights are multiplied by.
template <class Real, int kVectors>
struct KeptTile {
  const uint32_t* words = nullptr;  // null without dropout; [group of keys][row]
  int64_t shift = 0;                // from a tile's key to one of the first group
  Real scale = 1;

  TA_INLINE Kept<Real> at(int64_t key, int vector) const {
    const auto place = static_cast<uint64_t>(key + shift), group = place / Dropout::kKeysPerWord;
    Kept<Real> kept;
    load_kept(words + group * kDropoutRows<Real, kVectors> + vector * kLanes<Real>,
              static_cast<int>(place % Dropout::kKeysPerWord), kept);
    return kept;
  }
};

constexpr int kMostDropoutKeys = 128;  // of a tile

// Dropout for a panel of rows with one group of eight keys after the other, all of one (batch, head).
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
    constexpr int kLast = Dropout::kRounds - 1;
    for (int i = 0; i < 2; ++i) last_keys_[i] = (keys_[kLast][i] << 32) ^ kFlippedBytes;
    shared_limit_ = splat_int<double>(static_cast<int64_t>(dropout.shared_limit()) * (int64_t{1} << 32));
    least_kept_ = (WideVec{} + kBytes * smaller(dropout.least_kept(), 255)) ^ kFlippedBytes;
    drops_all_ = dropout.least_kept() > 255;
    may_drop_all_ = dropout.least_kept() >= 255;
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

  // The calls of kCount vectors of rows with group i, as KeptTile's words: those of its first keys, and `apart` further
  // those of the others. Side by side, as a call is a chain of instructions longer than what a core looks ahead.
  template <int kCount>
  TA_INLINE void drop(const Rows* rows, const Groups& groups, int64_t i, uint32_t* out, int64_t apart) const {
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
      store_dropped(c[0] << 32, xor_of(product1, c[1] << 32, last_keys_[0]),
                    xor_of(product0, c[3] << 32, last_keys_[1]), out + n * kLanes<float>, apart);
    });
  }

 private:
  static TA_INLINE WideVec consecutive(int64_t first) {
    return (WideVec)(splat_int<double>(first) + lane_numbers<double>());
  }
  static TA_INLINE void store_wide(uint64_t* out, WideVec v) { store(reinterpret_cast<double*>(out), (Vec<double>)v); }
  static TA_INLINE void store_wide(uint32_t* out, WideVec v) { store(reinterpret_cast<float*>(out), (Vec<float>)v); }

  // Of two vectors of own bits, which are dropped. shared: in the upper half of each lane.
  TA_INLINE void store_dropped(WideVec shared, WideVec first, WideVec second, uint32_t* out, int64_t apart) const {
#if defined(__AVX512F__)
    const __mmask8 more = _mm512_cmplt_epi64_mask((__m512i)shared, (__m512i)shared_limit_);
    const auto below = [&](WideVec own) TA_INLINE_LAMBDA {
      const __m512i least = _mm512_mask_add_epi64((__m512i)least_kept_, more, (__m512i)least_kept_, (__m512i)ones_);
      const __m512i dropped = _mm512_subs_epu8(least, (__m512i)own);
      if (!may_drop_all_) return (WideVec)dropped;
      return (WideVec)_mm512_mask_set1_epi64(dropped, drops_all_ ? __mmask8{0xFF} : more, -1);
    };
#else
    // Comparisons give -1, which is subtracted.
    const WideVec more = (WideVec)((IntVec<double>)shared < shared_limit_);
    const Bytes least = (Bytes)least_kept_ - (Bytes)more;
    const auto below = [&](WideVec own) TA_INLINE_LAMBDA {
      const WideVec dropped = (WideVec)(least > (Bytes)own);
      if (!may_drop_all_) return dropped;
      return dropped | more | (drops_all_ ? ~WideVec{} : WideVec{});
    };
#endif
    store_wide(out, below(first));
    store_wide(out + apart, below(second));
  }

  static constexpr uint64_t kBytes = 0x0101010101010101u;
#if defined(__AVX512F__)
  static constexpr uint64_t kFlippedBytes = 0;
#else
  // Vectors compare signed bytes.
  typedef int8_t Bytes __attribute__((vector_size(TA_VECTOR_BYTES)));
  static constexpr uint64_t kFlippedBytes = 0x80 * kBytes;
#endif

  WideVec keys_[Dropout::kRounds][2], last_keys_[2];
  WideVec round1_word0_, round1_word1_, round1_word2_;  // without the row and the group
  WideVec least_kept_, ones_ = WideVec{} + kBytes;
  IntVec<double> shared_limit_;
  bool drops_all_, may_drop_all_;  // by the shared bits: p > 255 / 256, a threshold that bytes do not hold
};

// Which weights are dropped, of keys [key, key + keys) and the rows of kVectors vectors from `row` on, which is even.
// For a tile whose key 0 is `origin`.
template <class Real, int kVectors>
TA_NOINLINE KeptTile<Real, kVectors> dropout_tile(const Dropout& dropout, int64_t batch_head, int64_t row, int64_t key,
                                                  int64_t keys, int64_t origin, Real scale, uint32_t* words) {
  constexpr int64_t kRows = kDropoutRows<Real, kVectors>;
  constexpr int kSets = kRows / kLanes<float>;
  const PhiloxPanel philox(dropout, batch_head);
  const int64_t first = round_down(key, Dropout::kKeysPerCall);
  const int64_t count = (key + keys - first + Dropout::kKeysPerCall - 1) / Dropout::kKeysPerCall;
  PhiloxPanel::Groups groups;
  philox.groups(first / Dropout::kKeysPerCall, count, groups);
  PhiloxPanel::Rows rows[kSets];
#pragma GCC unroll 3
  for (int n = 0; n < kSets; ++n) rows[n] = philox.rows(row + n * kLanes<float>);
  for (int64_t i = 0; i < count; ++i) philox.drop<kSets>(rows, groups, i, words + 2 * i * kRows, kRows);
  return {words, origin - first, scale};
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
