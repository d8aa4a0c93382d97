// The dropout bit of one attention weight: a pure function of the seed, the offset and the weight's place
// (batch, head, row, key), so that backward replays it and no tiling or thread count changes it. Used by every kernel,
// and by the op that writes the bits out for the composite path and the tests.
//
// Generator: Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), 10 rounds as in PyTorch.
#pragma once

#include <cstdint>

#include "macros.h"

namespace torch_attn {

struct Philox4x32 {
  static constexpr int kRounds = 10;
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

  struct Words {
    uint32_t word[4];
  };

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

// Four consecutive keys share one Philox call. The counter holds (key / 4, row, batch_head, 0) as 32-bit words, where
// batch_head is AttentionProblem::dropout_batch_head, plus the offset as a 64-bit number added to words 2 and 3; the
// Philox key is the seed. Lengths and B · Hq are below 2^32.
struct Dropout {
  uint64_t seed;
  uint64_t offset;
  uint32_t threshold;  // a weight is dropped when its 32-bit word is below this

  static constexpr int kKeysPerCall = 4;

  TA_HOST_DEVICE static Dropout make(double p, uint64_t seed, uint64_t offset) {
    return {seed, offset, p < 1 ? static_cast<uint32_t>(p * 4294967296.0) : 0xFFFFFFFFu};
  }
  // What a kept weight is multiplied by. p = 1 drops everything: a factor of 0, whatever the bits say.
  TA_HOST_DEVICE static double keep_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

  TA_HOST_DEVICE Philox4x32::Words counter(int64_t batch_head, int64_t row, int64_t key) const {
    const uint64_t high = offset + static_cast<uint64_t>(batch_head);
    return {{static_cast<uint32_t>(key / kKeysPerCall), static_cast<uint32_t>(row), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
  }
  TA_HOST_DEVICE bool keep(int64_t batch_head, int64_t row, int64_t key) const {
    const auto words = Philox4x32::generate(counter(batch_head, row, key), static_cast<uint32_t>(seed),
                                            static_cast<uint32_t>(seed >> 32));
    return words.word[key % kKeysPerCall] >= threshold;
  }
};

}  // namespace torch_attn
