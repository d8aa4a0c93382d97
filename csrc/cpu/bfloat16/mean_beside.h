// What becomes of weights that wait in a panel's layout: they join the mean over heads, beside tile products, or are
// written. Included by joint_weights.h.
#pragma once

#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// One panel's share of a block of keys and values, which is asked for line by line.
class BlockAhead {
 public:
  TA_INLINE BlockAhead(const char* keys, int64_t key_bytes, const char* values, int64_t value_bytes, int64_t panel,
                       int64_t panels)
      : now_(share_of(keys, key_bytes, panel, panels)), then_(share_of(values, value_bytes, panel, panels)) {}

  TA_INLINE void ask() {
    constexpr int kIntoL2 = 2;  // __builtin_prefetch's locality
    if (now_.place == now_.end) now_ = then_, then_ = {};
    if (now_.place == now_.end) return;
    __builtin_prefetch(now_.place, 0, kIntoL2);
    now_.place += kLine;
  }
  TA_NOINLINE void ask_for_rest() {
    while (now_.place != now_.end || then_.place != then_.end) ask();
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Lines {
    const char *place = nullptr, *end = nullptr;
  };
  static TA_INLINE Lines share_of(const char* block, int64_t bytes, int64_t panel, int64_t panels) {
    const int64_t lines = bytes / kLine;
    return {block + lines * panel / panels * kLine, block + lines * (panel + 1) / panels * kLine};
  }

  Lines now_, then_;
};

// The weights of one head at one panel and block of keys, [key][lane], which wait to be multiplied by factor[lane].
struct WaitingWeights {
  const float* weights;
  Vec<float> factor[kAmxVectors];
};

// sums[key][lane] = (is_first) or += the weights of a block of keys, if there are any. Done in parts, vectors, beside
// tile products, of which each step of one 2 × 2 block takes kParts. Each asks for a line of the next block, too: for
// three, 2 % slower.
template <int kParts>
class MeanBeside {
 public:
  TA_INLINE MeanBeside(const BlockAhead& ahead) : ahead_(ahead) {}
  TA_INLINE MeanBeside(const BlockAhead& ahead, const WaitingWeights& waiting, int64_t keys, bool is_first, float* sums)
      : ahead_(ahead), waiting_(waiting), sums_(sums), count_(keys * kAmxVectors), before_(is_first ? 0 : 0xFFFF) {}

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    constexpr int kFirst = parts_before(kSlot, kSlots, kParts), kLast = parts_before(kSlot + 1, kSlots, kParts);
#pragma GCC unroll 8
    for (int part = kFirst; part < kLast; ++part) {
      if (done_ < count_) part % kAmxVectors == 0 ? add<0>() : add<1>();
      ahead_.ask();
    }
  }
  TA_INLINE void finish() {
    while (done_ < count_) add<0>(), add<1>();
    ahead_.ask_for_rest();
  }

 private:
  static_assert(kAmxVectors == 2 && kParts % kAmxVectors == 0);

  template <int n>
  TA_INLINE void add() {
    const int64_t place = done_++ * kLanes<float>;
    const Vec<float> before = _mm512_maskz_loadu_ps(before_, sums_ + place);
    store(sums_ + place, load(waiting_.weights + place) * waiting_.factor[n] + before);
  }

  BlockAhead ahead_;
  WaitingWeights waiting_{};
  float* sums_ = nullptr;
  int64_t count_ = 0, done_ = 0;
  __mmask16 before_ = 0;
};

// Lane by lane: the float16 of first next to that of second.
TA_INLINE __m512i float16_pairs(Vec<float> first, Vec<float> second) {
  const auto halves = [](Vec<float> x) TA_INLINE_LAMBDA {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  };
  return _mm512_or_si512(halves(first), _mm512_slli_epi32(halves(second), 16));
}

// The weights, and sums (null: nothing) added, written to the rows of a tensor of float32 or float16 that start at
// columns: lines of 16 or 32 keys, of which the last may be a part.
template <class Stored>
TA_NOINLINE void write_weights(const WaitingWeights& waiting, int64_t keys, const float* sums, const TensorView& out,
                               char* columns, int64_t rows) {
  constexpr int n_lanes = kLanes<float>;
  constexpr int64_t kSize = sizeof(Stored), kLineKeys = 64 / kSize;
  const int64_t row_bytes = out.stride[2] * kSize;
  for (int64_t i = 0; i < rows; i += n_lanes) {
    const Vec<float> factor = waiting.factor[i / n_lanes];
    const auto weights_of = [&](int64_t key) TA_INLINE_LAMBDA {
      const int64_t place = key * kAmxLanes + i;
      const Vec<float> weights = load(waiting.weights + place) * factor;
      return sums == nullptr ? weights : weights + load(sums + place);
    };
    for (int64_t j = 0; j < keys; j += kLineKeys) {
      Vec<float> square[n_lanes];
#pragma GCC unroll 16
      for (int k = 0; k < n_lanes; ++k) {
        if constexpr (kSize == 4) {
          square[k] = weights_of(j + k);
        } else {  // neighbouring keys are one 32-bit element, so that a transposed tile holds 32 keys of a row
          square[k] = (Vec<float>)float16_pairs(weights_of(j + 2 * k), weights_of(j + 2 * k + 1));
        }
      }
      transpose_in_registers<float>(square);
      char* to = columns + i * row_bytes + j * kSize;
      const int64_t line_rows = smaller<int64_t>(rows - i, n_lanes), line_keys = smaller(keys - j, kLineKeys);
      if (line_rows == n_lanes && line_keys == kLineKeys) {
#pragma GCC unroll 16
        for (int lane = 0; lane < n_lanes; ++lane) _mm512_storeu_si512(to + lane * row_bytes, (__m512i)square[lane]);
        continue;
      }
      alignas(64) float lines[n_lanes][n_lanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < n_lanes; ++lane) store(lines[lane], square[lane]);
      for (int64_t lane = 0; lane < line_rows; ++lane)
        __builtin_memcpy(to + lane * row_bytes, lines[lane], line_keys * kSize);
    }
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
