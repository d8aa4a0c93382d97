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

// The online softmax of half of an accumulator, with this lane's part of the row's sum: scores become weights,
// 2^((score − maximum) · factor). Returns what all that was summed before is to be multiplied by.
template <bool kFull, int kGroups>
TA_DEVICE float softmax_row(float (&x)[kGroups][4], int half, float& maximum, float& sum, float factor) {
  float largest = maximum;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
  largest = row_max(largest);
  const float safe = OnlineSoftmax<Math<float>>::safe_maximum(largest), shift = safe * factor;
  const float rescale = maximum == largest ? 1.0f : ptx::ex2_approx((maximum - largest) * factor);
  maximum = largest;
  float total = 0;
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& element = x[n][2 * half + e];
      // A full kernel subtracts first: a mask's −3e38 times the factor would be infinite.
      element = ptx::ex2_approx(kFull ? (element - safe) * factor : element * factor - shift);
      total += element;
    }
  sum = sum * rescale + total;
  return rescale;
}

// Dropout bits of four accumulator fragments, of which n is the first, for all their elements i = 2 · half + e. A
// Philox call's two rows and eight keys belong to eight lanes, each of which holds as much of seven other calls, those
// of the other half and the other fragments: each lane makes one of the eight calls, and bits go round.
//
// Where rows are queries, from `row` on, and columns keys, from `key` on:
TA_DEVICE bool is_kept_in_query_rows(uint32_t kept, int n, int i) {
  return kept >> (i % 2 * 16 + i / 2 * 8 + n % 4) & 1;
}
TA_DEVICE uint32_t kept_of_query_rows(const HeadScore<float>& score, int64_t row, int64_t key) {
  const int lane = lane_index(), half = lane & 1, fragment = (lane & 2) + (lane / 4 & 1);
  uint32_t kept = kept_of_call(score.dropout, score.dropout_head, row + 8 * half + lane / 4, key + 8 * fragment);
  kept = exchange_kept<1, 8>(kept);
  kept = exchange_kept<2, 2>(kept);
  return exchange_kept<4, 1>(kept);
}

// Where rows are keys and columns queries. Bits of four further fragments fit beside these, shifted by 4.
TA_DEVICE bool is_kept_in_key_rows(uint32_t kept, int n, int i) {
  return kept >> (n % 4 / 2 * 16 + i / 2 * 8 + n / 4 * 4 + n % 2 * 2 + i % 2) & 1;
}
TA_DEVICE uint32_t kept_of_key_rows(const HeadScore<float>& score, int64_t key, int64_t row) {
  const int lane = lane_index(), half = lane / 8 & 1, fragment = (lane / 4 & 1) * 2 + lane / 16;
  uint32_t kept = kept_of_call(score.dropout, score.dropout_head, row + 8 * fragment + 2 * (lane % 4), key + 8 * half);
  kept = exchange_kept<4, 16>(kept);
  kept = exchange_kept<8, 8>(kept);
  return exchange_kept<16, 2>(kept);
}

}  // namespace torch_attn::cuda::sm80
