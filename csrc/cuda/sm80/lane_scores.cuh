// What a full kernel does to q·k in accumulators: softcap, ALiBi, attn_mask, and −∞ where nothing is attended. Used by
// the kernels of attention, its maps and hard attention.
//
// A lane's elements of one accumulator row are finished together, option by option, so that the whole block takes each
// branch and the loads of a mask are under way at once. Asked for every element instead, options that were off took
// three quarters of the forward pass.
#pragma once

#include "score_tile.cuh"

namespace torch_attn::cuda::sm80 {

// Whether a block may read a row of a boolean mask kBytes at a time.
template <int kBytes>
TA_DEVICE bool has_aligned_rows(const HeadMask& mask) {
  return (reinterpret_cast<uintptr_t>(mask.data) | static_cast<uintptr_t>(mask.row_stride)) % kBytes == 0;
}

// Bit i: byte i of the word is not 0.
TA_DEVICE uint32_t nonzero_bytes(uint32_t word) {
  word |= word >> 4;
  word |= word >> 2;
  word |= word >> 1;
  return (word & 0x01010101u) * 0x10204080u >> 28;
}

// A boolean mask's 4 · kCount bytes of one row, of which each of the four lanes that share the row reads a quarter.
// Bit 8 · (n % 4) + e of word n / 4: the lane's element (n, e) is attended.
template <int kCount>
TA_DEVICE void attended_bits(uint32_t (&bits)[kCount / 8], const unsigned char* row) {
  static_assert(kCount == 8 || kCount == 16, "");
  constexpr int kWords = kCount / 4;
  struct alignas(kCount) Quarter {
    uint32_t word[kWords];
  };
  const int quarter = lane_index() % 4;
  const Quarter mine = *reinterpret_cast<const Quarter*>(row + quarter * kCount);
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) own |= nonzero_bytes(mine.word[i]) << 4 * i;
  own <<= kCount * quarter % 32;
  own |= __shfl_xor_sync(~0u, own, 1);
  const uint32_t other = __shfl_xor_sync(~0u, own, 2);
  if constexpr (kCount == 8) {
    bits[0] = (own | other) >> 2 * quarter;
  } else {
    bits[0] = (quarter < 2 ? own : other) >> 2 * quarter;
    bits[1] = (quarter < 2 ? other : own) >> 2 * quarter;
  }
}

// Adds attn_mask to a lane's scores: element i is number column_of_lane(i) of `stride` from `index` on. Only what
// contains(i) says is attended is read, where it is `tested`.
template <int kCount, class Contains>
TA_DEVICE void add_mask(float (&scores)[kCount], const HeadMask& mask, int64_t index, int64_t stride, bool tested,
                        const Contains& contains) {
  const auto add = [&](auto type, const auto& bias_of) {
    const auto* from = reinterpret_cast<const decltype(type)*>(mask.data) + index + 2 * (lane_index() % 4) * stride;
    if (tested) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2, from += 8 * stride) {
        if (contains(i)) scores[i] += bias_of(from);
        if (contains(i + 1)) scores[i + 1] += bias_of(from + stride);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 2, from += 8 * stride) {
        scores[i] += bias_of(from);
        scores[i + 1] += bias_of(from + stride);
      }
    }
  };
  const auto number = [](const auto* x) { return static_cast<float>(load(x)); };
  switch (mask.dtype) {
    case ScalarType::kBool:
      if constexpr (kCount == 8 || kCount == 16) {
        if (!tested && stride == 1 && has_aligned_rows<kCount>(mask)) {
          uint32_t bits[kCount / 8];
          attended_bits<kCount>(bits, mask.data + index);
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            if (!(bits[i / 8] >> (i % 8 / 2 * 8 + i % 2) & 1)) scores[i] = -INFINITY;
          return;
        }
      }
      return add(uint8_t{}, [](const uint8_t* x) { return *x ? 0.0f : -INFINITY; });
    case ScalarType::kFloat64:
      return add(double{}, number);
    case ScalarType::kFloat32:
      return add(float{}, number);
    case ScalarType::kBFloat16:
      return add(BFloat16{}, number);
    case ScalarType::kFloat16:
      return add(Float16{}, number);
  }
}

// What becomes of a lane's capped q·k. distance(i): between position and key; mask_index and mask_stride as in
// add_mask.
template <int kCount, class Contains, class Distance>
TA_DEVICE void finish_scores(float (&scores)[kCount], const HeadScore<float>& score, bool tested,
                             const Contains& contains, const Distance& distance, int64_t mask_index,
                             int64_t mask_stride) {
  if (tested) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (!contains(i)) scores[i] = -INFINITY;
  }
  if (score.mod.slope != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      scores[i] += score.mod.slope * ScoreMod<Math<float>>::alibi_derivative(distance(i));
  }
  if (score.mask.data) add_mask(scores, score.mask, mask_index, mask_stride, tested, contains);
}

// Half of an accumulator's q·k becomes capped, in place; a copy of it waits to be finished.
template <int kGroups>
TA_DEVICE void cap_scores(float (&scores)[2 * kGroups], float (&x)[kGroups][4], int half,
                          const ScoreMod<Math<float>>& mod) {
  if (mod.softcap == 0) {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) x[i / 2][2 * half + i % 2] *= mod.scale;
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) x[i / 2][2 * half + i % 2] = mod.capped(x[i / 2][2 * half + i % 2]);
  }
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) scores[i] = x[i / 2][2 * half + i % 2];
}

// A lane's scores of row `row`, half `half` of its accumulators, which hold q·k and become capped; `tested`: false
// where score.inside() holds of the tile. The keys are first + column_of_lane(i).
template <class Score, int kGroups>
TA_DEVICE void scores_of_row(float (&scores)[2 * kGroups], float (&x)[kGroups][4], int half, const Score& score,
                             int64_t row, int64_t first, bool tested) {
  cap_scores(scores, x, half, score.mod);
  TileRange attended = {0, 8 * kGroups};
  if (tested) attended = TileRange::keys_of_row(score, row, first, 8 * kGroups);
  const float to_first = static_cast<float>(first - score.band.position(row));
  finish_scores(
      scores, score, tested, [&](int i) { return attended.contains(column_of_lane(i)); },
      [&](int i) { return to_first + static_cast<float>(column_of_lane(i)); },
      row * score.mask.row_stride + first * score.mask.key_stride, score.mask.key_stride);
}

// The same in place, for a forward pass. A plain kernel's scores stay in units of 1 / scale, and need this only where
// the tile is tested.
template <bool kFull, int kGroups>
TA_DEVICE void finish_row(float (&x)[kGroups][4], int half, const HeadScore<float>& score, int64_t row, int64_t first,
                          bool tested) {
  if constexpr (kFull) {
    float scores[2 * kGroups];
    scores_of_row(scores, x, half, score, row, first, tested);
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) x[i / 2][2 * half + i % 2] = scores[i];
  } else {
    const TileRange attended = TileRange::keys_of_row(score, row, first, 8 * kGroups);
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i)
      if (!attended.contains(column_of_lane(i))) x[i / 2][2 * half + i % 2] = -INFINITY;
  }
}

// scores_of_row of tiles whose rows are keys: the scores of key `key` with the query rows row + column_of_lane(i), for
// kernels that take all rows of a call.
template <int kGroups>
TA_DEVICE void scores_of_key(float (&scores)[2 * kGroups], float (&x)[kGroups][4], int half,
                             const HeadScore<float>& score, int64_t key, int64_t row, bool tested) {
  cap_scores(scores, x, half, score.mod);
  TileRange attending = {0, 8 * kGroups};
  if (tested) attending = TileRange::rows_of_key(score, key, row, 8 * kGroups);
  const float to_first = static_cast<float>(key - score.band.offset - row);
  finish_scores(
      scores, score, tested, [&](int i) { return attending.contains(column_of_lane(i)); },
      [&](int i) { return to_first - static_cast<float>(column_of_lane(i)); },
      row * score.mask.row_stride + key * score.mask.key_stride, score.mask.row_stride);
}

// Half of an accumulator's capped q·k becomes the gradient of q·k, from that of the scores.
template <int kGroups>
TA_DEVICE void to_gradients_of_products(float (&x)[kGroups][4], int half, const float (&grad_scores)[2 * kGroups],
                                        const ScoreMod<Math<float>>& mod) {
  if (mod.softcap == 0) {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) x[i / 2][2 * half + i % 2] = grad_scores[i] * mod.scale;
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      float& element = x[i / 2][2 * half + i % 2];
      element = grad_scores[i] * mod.capped_derivative(element);
    }
  }
}

}  // namespace torch_attn::cuda::sm80
