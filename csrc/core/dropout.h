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

// A weight takes 16 bits, and one Philox call serves two consecutive rows × four consecutive keys. Its counter holds
// (key / 4, row / 2, batch_head, 0) as 32-bit words, where batch_head is AttentionProblem::dropout_batch_head, plus the
// offset as a 64-bit number added to words 2 and 3; the Philox key is the seed. Lengths and B · Hq are below 2^32.
//
// Word 2 · (key % 4 / 2) + 1 − row % 2 is that of the weight: an even and an odd row are the lower and the upper half
// of one of the last round's 64-bit products, so that vectors whose lanes are rows need no shuffle, and four lanes that
// hold a fragment of tensor cores share calls along rows as along keys. An odd key takes the word's upper half.
struct Dropout {
  uint64_t seed;
  uint64_t offset;
  int32_t limit;  // see keeps

  static constexpr int kRounds = 7;
  static constexpr int kKeysPerCall = 4, kRowsPerCall = 2;
  static constexpr int64_t kResolution = 65536;

  // Probabilities are multiples of 1 / kResolution; the nearest one is meant. One that rounds to 0 drops nothing.
  TA_HOST_DEVICE static double rounded(double p) {
    return static_cast<double>(static_cast<int64_t>(p * kResolution + 0.5)) / kResolution;
  }
  // p must not round to 0: a call without dropout has no bits.
  TA_HOST_DEVICE static Dropout make(double p, uint64_t seed, uint64_t offset) {
    const auto dropped = static_cast<int64_t>(rounded(p) * kResolution);  // of kResolution values
    return {seed, offset, static_cast<int32_t>((dropped - kResolution / 2) * kResolution - 1)};
  }
  // What a kept weight is multiplied by, so that its expectation is the weight. With p = 1 none is kept, and any finite
  // number serves.
  TA_HOST_DEVICE static double keep_scale(double p) { return rounded(p) < 1 ? 1 / (1 - rounded(p)) : 1; }

  TA_HOST_DEVICE Philox4x32::Words counter(int64_t batch_head, int64_t row, int64_t key) const {
    const uint64_t high = offset + static_cast<uint64_t>(batch_head);
    return {{static_cast<uint32_t>(key) / kKeysPerCall, static_cast<uint32_t>(row) / kRowsPerCall,
             static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
  }
  // The call that (row, key) takes part in.
  TA_HOST_DEVICE Philox4x32::Words words(int64_t batch_head, int64_t row, int64_t key) const {
    return Philox4x32::generate<kRounds>(counter(batch_head, row, key), static_cast<uint32_t>(seed),
                                         static_cast<uint32_t>(seed >> 32));
  }
  // bits: 16 of them in the upper half, and anything below. As signed numbers, of which vectors compare faster.
  TA_HOST_DEVICE bool keeps(uint32_t bits) const { return static_cast<int32_t>(bits) > limit; }
  // Of the row and key with these remainders in their call.
  TA_HOST_DEVICE bool keeps(const Philox4x32::Words& call, int row, int key) const {
    const uint32_t word = call.word[key / 2 * 2 + 1 - row];
    return keeps(key % 2 == 0 ? word << 16 : word);
  }
};

}  // namespace torch_attn
