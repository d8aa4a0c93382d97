// What a full kernel does to q·k in accumulators: softcap, ALiBi, attn_mask, and −∞ where nothing is attended. Used by
// the kernels of attention, its maps and hard attention.
//
// All of a lane's elements are finished together, option by option, so that the whole block takes each branch and the
// loads of a mask are under way at once. Asked for every element instead, options that were off took three quarters of
// the forward pass.
//
// scores[r][i] is element i of the lane's accumulator row r: column column_of_lane(i) of the tile.
#pragma once

#include "score_tile.cuh"

namespace torch_attn::cuda::sm80 {

// Where attn_mask's numbers for a lane's scores lie: element (r, i) is number column_of_lane(i) of `stride` from
// index(r) on.
struct MaskPlaces {
  int64_t first, row_step, stride;

  TA_DEVICE int64_t index(int r) const { return first + r * row_step; }
};

// Bit i: byte i of the word is not 0.
TA_DEVICE uint32_t nonzero_bytes(uint32_t word) {
  word |= word >> 4;
  word |= word >> 2;
  word |= word >> 1;
  return (word & 0x01010101u) * 0x10204080u >> 28;
}

// A boolean mask's rows of a tile, of which each of the four lanes that share a row reads a quarter: what can be asked
// for before the scores are there. `loaded`: the same for the whole block.
template <int kRows, int kCount>
struct BoolRows {
  static constexpr bool kServed = kCount == 8 || kCount == 16;
  struct alignas(kServed ? kCount : 4) Quarter {
    uint32_t word[kCount / 4];
  };
  Quarter quarter[kRows];
  bool loaded = false;

  TA_DEVICE BoolRows() {}
  // tested: false where all of the tile's rows and keys exist.
  TA_DEVICE BoolRows(const HeadMask& mask, const MaskPlaces& places, bool tested) {
    if (!kServed || !mask.data || mask.dtype != ScalarType::kBool || places.stride != 1 || tested) return;
    if ((reinterpret_cast<uintptr_t>(mask.data) | static_cast<uintptr_t>(mask.row_stride)) % kCount != 0) return;
    loaded = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      quarter[r] = *reinterpret_cast<const Quarter*>(mask.data + places.index(r) + lane_index() % 4 * kCount);
  }

  TA_DEVICE void apply(float (&scores)[kRows][kCount]) const {
    const int mine = lane_index() % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) own |= nonzero_bytes(quarter[r].word[i]) << 4 * i;
      own <<= kCount * mine % 32;
      own |= __shfl_xor_sync(~0u, own, 1);
      const uint32_t other = __shfl_xor_sync(~0u, own, 2);
      // Of the row's keys, from the lane's own first on: the first 32, and the next.
      const uint32_t low = (kCount == 8 ? own | other : mine < 2 ? own : other) >> 2 * mine;
      const uint32_t high = (mine < 2 ? other : own) >> 2 * mine;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (!((i < 8 ? low : high) >> (i % 8 / 2 * 8 + i % 2) & 1)) scores[r][i] = -INFINITY;
    }
  }
};

// Whether two neighbours of a row can be loaded at once. Only asked where a lane has scores enough for it to matter:
// the code costs registers.
template <class Stored, int kScores>
TA_DEVICE bool has_aligned_pairs(const HeadMask& mask, int64_t stride) {
  const uintptr_t bytes = static_cast<uintptr_t>(mask.row_stride) * sizeof(Stored);
  return kScores >= 32 && stride == 1 && (reinterpret_cast<uintptr_t>(mask.data) | bytes) % (2 * sizeof(Stored)) == 0;
}

// Adds attn_mask, along whose keys (kAlongKeys) or rows a lane's elements lie. Only what contains(r, i) says is
// attended is read, where it is `tested`.
template <bool kAlongKeys, int kRows, int kCount, class Contains>
TA_DEVICE void add_mask(float (&scores)[kRows][kCount], const HeadMask& mask, const MaskPlaces& places,
                        const BoolRows<kRows, kCount>& bool_rows, bool tested, const Contains& contains) {
  if (bool_rows.loaded) return bool_rows.apply(scores);
  const auto add = [&](auto type, const auto& bias_of) {
    const auto* const data =
        reinterpret_cast<const decltype(type)*>(mask.data) + 2 * (lane_index() % 4) * places.stride;
    if (tested) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto* from = data + places.index(r);
#pragma unroll
        for (int i = 0; i < kCount; i += 2, from += 8 * places.stride) {
          if (contains(r, i)) scores[r][i] += bias_of(from);
          if (contains(r, i + 1)) scores[r][i + 1] += bias_of(from + places.stride);
        }
      }
    } else if (has_aligned_pairs<decltype(type), kAlongKeys ? kRows * kCount : 0>(mask, places.stride)) {
      struct alignas(2 * sizeof(type)) Pair {
        decltype(type) element[2];
      };
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
          const Pair pair = *reinterpret_cast<const Pair*>(data + places.index(r) + 4 * i);
#pragma unroll
          for (int e = 0; e < 2; ++e) scores[r][i + e] += bias_of(&pair.element[e]);
        }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto* from = data + places.index(r);
#pragma unroll
        for (int i = 0; i < kCount; i += 2, from += 8 * places.stride) {
          scores[r][i] += bias_of(from);
          scores[r][i + 1] += bias_of(from + places.stride);
        }
      }
    }
  };
  const auto number = [](const auto* x) { return static_cast<float>(load(x)); };
  switch (mask.dtype) {
    case ScalarType::kBool:
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

// Softcap and scale.
template <int kRows, int kCount>
TA_DEVICE void cap_scores(float (&scores)[kRows][kCount], const ScoreMod<Math<float>>& mod) {
  if (mod.softcap == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[r][i] *= mod.scale;
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[r][i] = mod.capped(scores[r][i]);
  }
}

// What follows softcap and scale; kAlongKeys as in add_mask. distance(r, i): between position and key.
template <bool kAlongKeys, int kRows, int kCount, class Contains, class Distance>
TA_DEVICE void finish_scores(float (&scores)[kRows][kCount], const HeadScore<float>& score, const MaskPlaces& places,
                             const BoolRows<kRows, kCount>& bool_rows, bool tested, const Contains& contains,
                             const Distance& distance) {
  if (tested) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (!contains(r, i)) scores[r][i] = -INFINITY;
  }
  if (score.mod.slope != 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        scores[r][i] += score.mod.slope * ScoreMod<Math<float>>::alibi_derivative(distance(r, i));
  }
  if (score.mask.data) add_mask<kAlongKeys>(scores, score.mask, places, bool_rows, tested, contains);
}

// A tile whose rows are queries: those of the lane are `row` and every eighth from there on, the keys first +
// column_of_lane(i). `tested`: false where score.inside() holds of the tile.
template <int kRows, int kCount>
struct QueryRows {
  const HeadScore<float>& score;
  int64_t row, first;
  bool tested;
  MaskPlaces places;

  TA_DEVICE QueryRows(const HeadScore<float>& score_, int64_t row_, int64_t first_, bool tested_)
      : score(score_),
        row(row_),
        first(first_),
        tested(tested_),
        places{row_ * score.mask.row_stride + first_ * score.mask.key_stride, 8 * score.mask.row_stride,
               score.mask.key_stride} {}
  TA_DEVICE BoolRows<kRows, kCount> bool_rows() const { return {score.mask, places, tested}; }
  TA_DEVICE float to_first(int r) const { return static_cast<float>(first - score.band.position(row + 8 * r)); }

  TA_DEVICE void finish(float (&scores)[kRows][kCount], const BoolRows<kRows, kCount>& bool_rows) const {
    TileRange attended[kRows];
    float distance[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (tested) attended[r] = TileRange::keys_of_row(score, row + 8 * r, first, 4 * kCount);
      distance[r] = to_first(r);
    }
    finish_scores<true>(
        scores, score, places, bool_rows, tested, [&](int r, int i) { return attended[r].contains(column_of_lane(i)); },
        [&](int r, int i) { return distance[r] + static_cast<float>(column_of_lane(i)); });
  }
};

// A tile whose rows are keys: those of the lane are `key` and every eighth from there on, the queries row +
// column_of_lane(i). For kernels that take all rows of a call.
template <int kRows, int kCount>
TA_DEVICE void finish_scores_of_keys(float (&scores)[kRows][kCount], const HeadScore<float>& score, int64_t key,
                                     int64_t row, bool tested) {
  const MaskPlaces places = {row * score.mask.row_stride + key * score.mask.key_stride, 8 * score.mask.key_stride,
                             score.mask.row_stride};
  TileRange attending[kRows];
  float distance[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (tested) attending[r] = TileRange::rows_of_key(score, key + 8 * r, row, 4 * kCount);
    distance[r] = static_cast<float>(key + 8 * r - score.band.offset - row);
  }
  finish_scores<false>(
      scores, score, places, {}, tested, [&](int r, int i) { return attending[r].contains(column_of_lane(i)); },
      [&](int r, int i) { return distance[r] - static_cast<float>(column_of_lane(i)); });
}

// Calls body with the accumulators as scores[2 · kM][2 · kGroups], and takes back what that becomes: registers change
// their names, nothing moves.
template <int kM, int kGroups, class Body>
TA_DEVICE void as_rows(float (&x)[kM][kGroups][4], const Body& body) {
  float scores[2 * kM][2 * kGroups];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) scores[r][i] = x[r / 2][i / 2][r % 2 * 2 + i % 2];
  body(scores);
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) x[r / 2][i / 2][r % 2 * 2 + i % 2] = scores[r][i];
}

// The gradient of capped scores becomes that of q·k. Where there is a softcap its derivative is a function of q·k,
// which products() computes once more into what it is given: kept instead, it would take registers from all other
// calls.
template <int kGroups, class Products>
TA_DEVICE void to_gradients_of_products(float (&grad)[1][kGroups][4], const ScoreMod<Math<float>>& mod,
                                        const Products& products) {
  if (mod.softcap == 0) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[0][n][e] *= mod.scale;
    return;
  }
  float x[1][kGroups][4] = {};
  products(x);
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) grad[0][n][e] *= mod.capped_derivative(mod.capped(x[0][n][e]));
}

}  // namespace torch_attn::cuda::sm80
