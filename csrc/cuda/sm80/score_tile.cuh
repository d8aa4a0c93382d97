// Which of a tile's rows and keys attend, and the dropout bits of accumulators: where the layout of mma meets
// head_score.cuh. What else a score is made of is lane_scores.cuh's.
//
// Kernels come in two kinds. Plain ones serve scaled scores with a band mask (causal, windows, key lengths) and leave
// the scale to the exponential; full ones apply softcap, ALiBi, attn_mask and dropout as well, and read paged caches.
#pragma once

#include "tile.cuh"

namespace torch_attn::cuda::sm80 {

template <class T, bool kFull>
using KeysOf = std::conditional_t<kFull, KeyRows<T>, Rows<T>>;

// What lies behind the last key of a paged cache is not read: neither rows nor pages need be valid there.
template <bool kFull>
TA_DEVICE int64_t keys_to_read(const AttentionProblem& p, const HeadScore<float>& score, int64_t batch) {
  return kFull && p.key.pages ? score.band.key_length : p.keys_of(batch);
}

// The lane's columns of a row of accumulators: element i is column column_of_lane(i) of the tile.
TA_DEVICE int column_of_lane(int i) { return i / 2 * 8 + 2 * (lane_index() % 4) + i % 2; }

// The keys of a row, or the rows of a key, that attend: [begin, end), counted from a tile's first and cut to [0, size).
struct TileRange {
  int begin, end;

  TA_DEVICE static TileRange keys_of_row(const HeadScore<float>& score, int64_t row, int64_t first, int size) {
    const KeyRange keys = score.band.keys_of_row(row);
    return {clamp(keys.begin - first, size), row < score.query_length ? clamp(keys.end - first, size) : 0};
  }
  TA_DEVICE static TileRange rows_of_key(const HeadScore<float>& score, int64_t key, int64_t first, int size) {
    const RowRange rows = score.rows_of_any(key, key + 1);
    return {clamp(rows.begin - first, size), clamp(rows.end - first, size)};
  }
  TA_DEVICE bool contains(int i) const { return begin <= i && i < end; }

 private:
  TA_DEVICE static int clamp(int64_t x, int size) { return x < 0 ? 0 : x > size ? size : static_cast<int>(x); }
};

// Half of an accumulator, where it does not attend, becomes `value`.
template <int kGroups>
TA_DEVICE void set_unattended(float (&x)[kGroups][4], int half, const TileRange& attended, float value) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i)
    if (!attended.contains(column_of_lane(i))) x[i / 2][2 * half + i % 2] = value;
}

// Dropout bits of one accumulator fragment whose rows are queries and columns keys: bit 2 · half + e for element
// (half, e). The four keys of a Philox call belong to two lanes, which hold two rows each: each lane makes the call of
// one row, half `lane % 2`, and hands it to the other. `row` and `dropout_head` are that row's.
TA_DEVICE uint32_t kept_of_query_rows(const Dropout& dropout, int64_t dropout_head, int64_t row, int64_t key) {
  const int odd = lane_index() & 1;
  const int64_t group = key / Dropout::kKeysPerCall + lane_index() % 4 / 2;
  const uint32_t mine = kept_keys(dropout, dropout_head, row, group);
  const uint32_t other = __shfl_xor_sync(~0u, mine, 1);
  const uint32_t first = odd ? other : mine, second = odd ? mine : other;
  return (first >> 2 * odd & 3) | (second >> 2 * odd & 3) << 2;
}

// The same for the rows of one head, of which the fragment's first is `row`.
TA_DEVICE uint32_t kept_of_query_rows(const HeadScore<float>& score, int64_t row, int64_t key) {
  return kept_of_query_rows(score.dropout, score.dropout_head, row + lane_index() / 4 + 8 * (lane_index() & 1), key);
}

// The same where rows are keys and columns queries. The four keys of a call belong to four lanes, which hold four
// (half, e) pairs each: each lane makes the call of one pair.
TA_DEVICE uint32_t kept_of_key_rows(const HeadScore<float>& score, int64_t key, int64_t row) {
  const int lane = lane_index(), place = lane / 4 % 4;  // of the lane's key in its call
  const int64_t group = (key + 8 * (place / 2)) / Dropout::kKeysPerCall + lane / 16;
  const uint32_t mine = kept_keys(score.dropout, score.dropout_head, row + 2 * (lane % 4) + place % 2, group);
  uint32_t bits = 0;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) bits |= (__shfl_sync(~0u, mine, (lane & ~12) | pair << 2) >> place & 1) << pair;
  return bits;
}

}  // namespace torch_attn::cuda::sm80
