// How hard attention chooses keys: the rules, the noise behind a draw, and the plain data its kernels take beside the
// AttentionProblem. Used by every selection kernel and by the op that writes the noise out for the composite path and
// the tests.
//
// The noise is a pure function of the seed, the offset and the place (batch, head, row, key or group of keys, sample),
// as dropout's is, so that no tiling, instruction set or thread count changes it. Both samplers are the Gumbel-max
// trick (Gumbel 1954; Maddison et al. 2014, "A* Sampling"): argmax of score + g with g = −log E, E ~ Exp(1).
//
// With replacement, in the form of a race: key j arrives at the time E_j / exp(score_j), and the first wins. The first
// of a group of keys arrives at E / Σ exp(score), where the sum is over the group, and which key of the group it is
// does not depend on that time. So a group needs one E and one uniform number, not one a key; only groups that lead the
// race are looked into.
//
// Without replacement: the keys of the highest score + g (Vieira 2014; Kool et al. 2019, "Stochastic Beams and Where to
// Find Them"), which needs one E a key.
#pragma once

#include "dropout.h"
#include "problem.h"

namespace torch_attn {

enum class SelectionRule : uint8_t {
  kHighest,             // the highest scores; among equal ones the lowest index first
  kWithReplacement,     // independent draws from the softmax
  kWithoutReplacement,  // draws of different keys, as if each drawn one left the softmax
};

struct SelectionNoise {
  uint64_t seed;
  uint64_t offset;

  static constexpr int kRounds = 10;     // of Philox; noise is not what a draw spends its time on
  static constexpr int kGroupKeys = 32;  // groups start at multiples of this
  static constexpr int kGroupsPerCall = 2;
  static constexpr int kKeysPerCall = 4;

  // With replacement. Two neighbouring groups share one Philox call: words 2 · (group % 2) and the next are the group's
  // E and its uniform number. A sink is a group of its own, after the last. Dropout's counters are below 2^29 in word
  // 0.
  TA_HOST_DEVICE Philox4x32::Words group_counter(int64_t batch_head, int64_t row, int64_t group, int64_t sample) const {
    return counter(0x80000000u | static_cast<uint32_t>(group / kGroupsPerCall), batch_head, row, sample);
  }
  // Without replacement. Four neighbouring keys share one call, word key % 4 is the key's E. A sink is the key after
  // the last.
  TA_HOST_DEVICE Philox4x32::Words key_counter(int64_t batch_head, int64_t row, int64_t key) const {
    return counter(0xC0000000u | static_cast<uint32_t>(key / kKeysPerCall), batch_head, row, 0);
  }
  TA_HOST_DEVICE Philox4x32::Words words(Philox4x32::Words counter) const {
    return Philox4x32::generate<kRounds>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }

  // At least one.
  TA_HOST_DEVICE static int64_t groups(int64_t keys) { return keys > 0 ? (keys + kGroupKeys - 1) / kGroupKeys : 1; }

 private:
  TA_HOST_DEVICE Philox4x32::Words counter(uint32_t first, int64_t batch_head, int64_t row, int64_t sample) const {
    const uint64_t high = offset + static_cast<uint64_t>(batch_head) + (static_cast<uint64_t>(sample) << 32);
    return {{first, static_cast<uint32_t>(row), static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
  }
};

// E ~ Exp(1) from 32 random bits, given as a number: −log(1 − v), of full relative precision where v and E are tiny
// (those win), by Kahan's form of log1p. Math gives log, select_equal and splat (see score_mod.h).
template <class Math>
TA_HOST_DEVICE typename Math::Value exponential_variate(typename Math::Value word) {
  using Real = typename Math::Real;
  using Value = typename Math::Value;
  const Value largest = Math::splat(sizeof(Real) == 8 ? Real(1 - 1.0 / 8589934592.0) : Real(1 - 1.0 / 16777216.0));
  const Value scaled = (word + Math::splat(Real(0.5))) * Real(1.0 / 4294967296.0);
  const Value v = scaled > largest ? largest : scaled;
  const Value rest = Math::splat(1) - v;
  return Math::select_equal(rest, Math::splat(1), v, v * Math::log(rest) / (rest - Math::splat(1)));
}
// Uniform in [0, 1) from the upper 24 bits of a word, given as a number: exact in float.
template <class Real>
constexpr Real kUniformUnit = Real(1.0 / 16777216.0);

// What a selection kernel writes, all contiguous: indices and the two of the chosen keys (B, Hq, L, count), the others
// (B, Hq, L); all but indices of accumulator type. A place that no key is left for holds index −1, score −∞ and
// log-probability 0. The sink, if there is one, takes part as the key S.
struct SelectionOutputs {
  int64_t* indices = nullptr;
  void* scores = nullptr;
  void* log_prob = nullptr;
  void* entropy = nullptr;  // of the softmax, sink included, in nats; 0 in empty rows
  void* logsumexp = nullptr;
};

struct Selection {
  SelectionRule rule = SelectionRule::kHighest;
  int64_t count = 1;
};

// What the backward pass of selection reads beside BackwardTensors, whose out and grad_out have no columns and whose
// grad_logsumexp is the whole coefficient of d logsumexp. The gradient of score (i, j) gets
// P_ij · log_weight_gradient_i · log P_ij, and chosen_gradient where j was chosen.
struct SelectionBackwardTensors : BackwardTensors {
  const void* log_weight_gradient = nullptr;  // (B, Hq, L), contiguous, accumulator type; null: zero
  const int64_t* indices = nullptr;           // (B, Hq, L, count), contiguous; others than keys are passed over
  const void* chosen_gradient = nullptr;      // the same, accumulator type; null: zero
  int64_t count = 0;
};

// Rows of a tensor by number: what is read of value, and what chosen scores pass back to key and query. Numbers that
// are no row of source count as a row of zeros.
struct RowChoice {
  int64_t batch = 0, heads = 0, kv_heads = 0;  // query head h reads source head h / (heads / kv_heads)
  int64_t length = 0;                          // of each query head
  int64_t count = 0;                           // choices of each query row
  int64_t source_length = 0, columns = 0;
  const int64_t* indices = nullptr;  // (batch, heads, length, count), contiguous
  const void* weights = nullptr;     // the same, accumulator type; null: 1
};

}  // namespace torch_attn
