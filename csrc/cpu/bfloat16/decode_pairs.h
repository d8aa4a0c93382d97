// The two products of ../decode.h for bfloat16 and few rows by `vdpbf16ps`: lanes run along the columns of key and
// value, as in ../decode_vectors.h, whose tiles these are, and nothing is converted but the weights. Included by
// kernels.h.
#pragma once

#include "../decode.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

TA_INLINE __m512bh load_halves(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

// One bfloat16 vector, and the columns that its pairs are.
constexpr int64_t kHalfLanes = 2 * kLanes<float>;

// scores[row · kDecodeKeys + key] = query[row] · keys[key] for kRows rows of query and 16 keys; dim is a multiple of
// kHalfLanes.
template <int kRows>
TA_NOINLINE void decode_pair_dots(const uint16_t* query, HalfRows keys, int64_t dim, float* scores, LinesAhead& lines) {
  constexpr int n = kLanes<float>;
  constexpr int kAtOnce = kDotKeys<float, uint16_t, kRows>;
  LinesAhead ahead = lines;  // in registers
  Vec<float> partial[kRows][n];
  for (int i0 = 0; i0 < n; i0 += kAtOnce) {
    __m512 acc[kRows][kAtOnce] = {};
    const uint16_t* row = keys.data + i0 * keys.stride;
    for (int64_t d = 0; d < dim; d += kHalfLanes) {
      ahead.ask();
      __m512bh q[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) q[r] = load_halves(query + r * dim + d);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const __m512bh k = load_halves(row + i * keys.stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], q[r], k);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) partial[r][i0 + i] = (Vec<float>)acc[r][i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store(scores + r * kDecodeKeys, sums_of_lanes<float>(partial[r]));
  lines = ahead;
}

// out[row][column] = out[row][column] · rescale[row] + Σ_key weights[row][key] · values[key][column], for kRows rows,
// an even number of keys and kPieces · kHalfLanes columns. Two rows of values are interleaved within quarters of a
// vector, the only way that takes no index: sums[…][0] holds columns 0 to 3 of every 8, sums[…][1] the others.
template <int kRows, int kPieces>
TA_NOINLINE void decode_pair_combine(const uint16_t* weights, HalfRows values, int64_t keys, const float* rescale,
                                     float* out, int64_t out_stride, LinesAhead& lines) {
  constexpr int n = kLanes<float>;
  LinesAhead ahead = lines;
  __m512 acc[kRows][kPieces][2] = {};
  for (int64_t key = 0; key < keys; key += 2) {
    ahead.ask();
    __m512bh weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, weights + r * kDecodeKeys + key, sizeof pair);
      weight[r] = (__m512bh)_mm512_set1_epi32(pair);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPieces; ++i) {
      const uint16_t* place = values.data + key * values.stride + i * kHalfLanes;
      const __m512i even = _mm512_loadu_si512(place), odd = _mm512_loadu_si512(place + values.stride);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][i][0] = _mm512_dpbf16_ps(acc[r][i][0], weight[r], low);
        acc[r][i][1] = _mm512_dpbf16_ps(acc[r][i][1], weight[r], high);
      }
    }
  }
  IntVec<float> first{};
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) first[i] = (i / 8) * 4 + i % 4 + (i / 4 % 2) * n;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kPieces; ++i) {
      const Vec<float> low = (Vec<float>)acc[r][i][0], high = (Vec<float>)acc[r][i][1];
      float* place = out + r * out_stride + i * kHalfLanes;
      store(place, load(place) * rescale[r] + __builtin_shuffle(low, high, first));
      store(place + n, load(place + n) * rescale[r] + __builtin_shuffle(low, high, first + n / 2));
    }
  }
  lines = ahead;
}

struct DecodePairs {
  using Real = float;
  static constexpr int64_t kKeys = kDecodeKeys;
  static constexpr bool kAsksBesideSoftmax = false;
  static constexpr bool kWeighs = false;
  static constexpr int64_t kRowGranule = 1;
  static constexpr int64_t kColumnGranule = kHalfLanes;

  // Up to so many rows these are faster than a panel of forward.h, half empty.
  static bool suits(int64_t query_length) { return query_length <= kAmxLanes / 2; }

  const AttentionProblem& p;
  int64_t batch, kv_head, rows, head_dim, value_dim;
  uint16_t *query, *key_scratch, *value_scratch;
  uint16_t* weights;  // [row][kDecodeKeys]

  DecodePairs(const AttentionProblem& problem, int64_t batch_index, int64_t head_index, int64_t row_count,
              Scratch& scratch)
      : p(problem),
        batch(batch_index),
        kv_head(head_index),
        rows(row_count),
        head_dim(round_up(p.head_dim, kHalfLanes)),
        value_dim(round_up(p.value_dim, kHalfLanes)),
        query(scratch.take<uint16_t>(rows * head_dim)),
        key_scratch(scratch.take<uint16_t>(kDecodeKeys * head_dim)),
        value_scratch(scratch.take<uint16_t>(kDecodeKeys * value_dim)),
        weights(scratch.take<uint16_t>(rows * kDecodeKeys)) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = kv_head * (p.heads / p.kv_heads) + row / p.query_length;
      copy_half_rows(query + row * head_dim, p.query, batch, head, row % p.query_length, 1, p.head_dim, 1, head_dim);
    }
  }

  void dots(int64_t key, int64_t keys, float* scores, LinesAhead& ahead) {
    constexpr int64_t n = kLanes<float>;
    ahead.divide(dot_steps<float, uint16_t>(rows, keys, head_dim / kHalfLanes));
    const HalfRows key_rows =
        half_rows(p.key, batch, kv_head, key, keys, p.head_dim, round_up(keys, n), head_dim, key_scratch);
    for (int64_t j = 0; j < keys; j += n) {  // outside: these keys stay in the L1 cache for all rows
      for_each_decode_tile(rows, [&]<int kRows>(int64_t row) TA_INLINE_LAMBDA {
        decode_pair_dots<kRows>(query + row * head_dim, {key_rows.data + j * key_rows.stride, key_rows.stride},
                                head_dim, scores + row * kDecodeKeys + j, ahead);
      });
    }
  }

  void combine(int64_t key, int64_t keys, const float* float_weights, const float* rescale, float* out,
               int64_t out_stride, LinesAhead& ahead) {
    const int64_t all_keys = round_up(keys, 2);
    ahead.divide(combine_steps(rows, all_keys / 2, value_dim / kHalfLanes, 4, 2));
    const HalfRows values =
        half_rows(p.value, batch, kv_head, key, keys, p.value_dim, all_keys, value_dim, value_scratch);
    for (int64_t i = 0; i < rows * kDecodeKeys; i += kHalfLanes)
      store_halves(weights + i, load(float_weights + i), load(float_weights + i + kLanes<float>));
    int64_t column = 0;
    const auto cover = [&]<int kMostRows, int kPieces>() TA_INLINE_LAMBDA {
      for (; column + kPieces * kHalfLanes <= value_dim; column += kPieces * kHalfLanes) {
        for_each_tile<kMostRows>(0, rows, [&]<int kRows>(int64_t row) TA_INLINE_LAMBDA {
          decode_pair_combine<kRows, kPieces>(weights + row * kDecodeKeys, {values.data + column, values.stride},
                                              all_keys, rescale + row, out + row * out_stride + column, out_stride,
                                              ahead);
        });
      }
    };
    if (rows <= kFewRowsOfDecode) cover.template operator()<2, 4>();
    cover.template operator()<4, 2>();
    cover.template operator()<4, 1>();
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
