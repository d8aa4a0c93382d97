// The dropout bit of one attention weight: a pure function of the seed, the offset and the weight's place
// (batch, head, row, key), so that backward replays it and no tiling or thread count changes it. Used by every kernel,
// and by the op that writes the bits out for the composite path and the tests.
//
// Generator: Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). 7 rounds are the fewest
// that pass BigCrush (their table 2), and what dropout takes, as FlashAttention does; PyTorch's 10 cost 40 % more.
#pragma once

#include <cstdint>

#include "macros.h"

namespace torch_attn {

struct Philox4x32 {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

  struct Words {
    uint32_t word[4];
  };

  template <int kRounds>
  TA_HOST_DEVICE static Words generate(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t product0 = uint64_t{kMultiplier0} * counter.word[0];
      const uint64_t product1 = uint64_t{kMultiplier1} * counter.word[2];
      counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                  static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
    return counter;
  }
};

// A weight is dropped if its number, of 16 bits, is below threshold. The upper 8 bits are its own; the lower 8, which
// decide only where the upper ones equal threshold's, are shared by the 16 weights of a Philox call: two consecutive
// rows × eight consecutive keys. The call's counter holds (key / 8, row / 2, batch_head, 0) as 32-bit words, where
// batch_head is AttentionProblem::dropout_batch_head, plus the offset as a 64-bit number added to words 2 and 3; the
// Philox key is the seed. Lengths and B · Hq are below 2^32.
//
// Own bits: word 2 · (key % 8 / 4) + 1 − row % 2, byte place_in_word(key). An even and an odd row are the lower and the
// upper half of one of the last round's 64-bit products, so that vectors whose lanes are rows need no shuffle; of a
// word's halves, the lower one has even keys, and the upper one odd keys, as have the pairs that matrix instructions
// for bfloat16 take.
//
// Shared bits: the top byte of the word that the last round multiplies to word 3, with its top bit flipped, so that
// vectors compare it as a signed number. Multiplication by an odd number is one to one and carries upwards: word 3's
// lower three bytes say nothing about that byte, its upper one nothing without the other three, and the other words
// are xors with, or multiples of, other words of that round. So a weight's number is uniform and p exact, and two
// weights are independent unless both are undecided by their own bits, with probability 2^-16: their covariance is at
// most 2^-16 / 4, half of what rounding p may change. With 16 bits of their own dropout would take twice as many calls.
struct Dropout {
  uint64_t seed;
  uint64_t offset;
  int32_t threshold;  // of kResolution

  static constexpr int kRounds = 7;
  static constexpr int kKeysPerCall = 8, kRowsPerCall = 2, kKeysPerWord = 4;
  static constexpr int64_t kResolution = 65536;

  // Probabilities are multiples of 1 / kResolution; the nearest one is meant. One that rounds to 0 drops nothing.
  TA_HOST_DEVICE static double rounded(double p) {
    return static_cast<double>(static_cast<int64_t>(p * kResolution + 0.5)) / kResolution;
  }
  TA_HOST_DEVICE static Dropout make(double p, uint64_t seed, uint64_t offset) {
    return {seed, offset, static_cast<int32_t>(rounded(p) * kResolution)};
  }
  // What a kept weight is multiplied by, so that its expectation is the weight. With p = 1 none is kept, and any finite
  // number serves.
  TA_HOST_DEVICE static double keep_scale(double p) { return rounded(p) < 1 ? 1 / (1 - rounded(p)) : 1; }

  TA_HOST_DEVICE Philox4x32::Words counter(int64_t batch_head, int64_t row, int64_t key) const {
    const uint64_t high = offset + static_cast<uint64_t>(batch_head);
    return {{static_cast<uint32_t>(key) / kKeysPerCall, static_cast<uint32_t>(row) / kRowsPerCall,
             static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
  }
  struct Call {
    Philox4x32::Words words;
    uint32_t shared;  // the shared bits are its top byte, their top bit not yet flipped
  };
  // The call that (row, key) takes part in.
  TA_HOST_DEVICE Call call(int64_t batch_head, int64_t row, int64_t key) const {
    const auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    const auto before = Philox4x32::generate<kRounds - 1>(counter(batch_head, row, key), key0, key1);
    constexpr uint32_t kLast = kRounds - 1;
    return {Philox4x32::generate<1>(before, key0 + kLast * Philox4x32::kWeyl0, key1 + kLast * Philox4x32::kWeyl1),
            before.word[0]};
  }

  // A weight is dropped whose own bits are below least_kept() or, where shared < shared_limit() as signed numbers,
  // below least_kept() + 1.
  TA_HOST_DEVICE int least_kept() const { return threshold >> 8; }
  TA_HOST_DEVICE int32_t shared_limit() const { return ((threshold & 0xFF) - 128) * (1 << 24); }

  // The byte of a word that is key's.
  TA_HOST_DEVICE static constexpr int place_in_word(int key) { return key % 2 * 2 + key % kKeysPerWord / 2; }
  // Of the row and key with these remainders in their call.
  TA_HOST_DEVICE bool keeps(const Call& call, int row, int key) const {
    const uint32_t word = call.words.word[key / kKeysPerWord * 2 + 1 - row];
    const int own = word >> 8 * place_in_word(key) & 0xFF;
    return own >= least_kept() + (static_cast<int32_t>(call.shared) < shared_limit() ? 1 : 0);
  }
};

}  // namespace torch_attn
