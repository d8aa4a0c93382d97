// The two products of decode.h, on vectors whose lanes run along the columns of key and value. Included by decode.h.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "scratch.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kDecodeKeys = 64;  // keys per block

// A block of rows as they are stored, in whole vectors; their number is a multiple of the vector length, too.
template <class Stored>
struct StoredRows {
  const Stored* data;
  int64_t stride;
};

// Rows of one head that are read next, asked for into the L2 cache a few lines at each step of a product's inner loop:
// in portions between the register tiles (pack.h's RowsAhead), memory and arithmetic still take turns, and 4 to 8 rows
// in float32 read at 0.8 of the speed. Rows that cross a page are not asked for.
class LinesAhead {
 public:
  LinesAhead(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns)
      : step_(view.stride[2] * element_size(view.dtype)), bytes_(columns * element_size(view.dtype)) {
    if (rows <= 0 || bytes_ <= 0 || !is_one_run(view, row, rows)) return;
    row_ = element(view, batch, head, row);
    rows_ = rows;
  }
  // What is left, cut into so many steps.
  TA_INLINE void divide(int64_t steps) {
    const int64_t lines = (bytes_ + 63) / 64 * rows_ - offset_ / 64;
    per_step_ = (lines + steps - 1) / larger<int64_t>(steps, 1);
  }
  TA_INLINE void ask() {
    constexpr int kIntoL2 = 2;  // __builtin_prefetch's locality
    for (int64_t n = per_step_; n > 0 && rows_ > 0; --n) {
      __builtin_prefetch(row_ + offset_, 0, kIntoL2);
      offset_ += 64;
      if (offset_ < bytes_) continue;
      offset_ = 0;
      row_ += step_;
      --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t step_, bytes_, rows_ = 0, offset_ = 0, per_step_ = 0;
};

// The sum of each vector's lanes, in the lane of its number.
template <class Real>
TA_INLINE Vec<Real> sums_of_lanes(Vec<Real> (&v)[kLanes<Real>]) {
#pragma GCC unroll 4
  for (int step = kLanes<Real> / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      Vec<Real> low, high;
      interleave<Real>(v[i], v[i + step], low, high);
      v[i] = low + high;
    }
  }
  return v[0];
}

// Up to so many rows the products wait for memory, which delivers fastest in order: tiles as wide as a row of key or
// value can be, if less square.
constexpr int64_t kFewRowsOfDecode = 4;

// A register tile is so many rows of query by as many keys, or vectors of columns, as leave the accumulators in
// registers: each vector of key or value is converted once for kRows rows.
template <class Real, int kRows>
constexpr int kDecodeTile = smaller<int>(8, (TA_VECTOR_BYTES == 64 ? 16 : 8) / kRows);

// Keys that decode_dots reads at once. Rows of two-byte elements are short: in whole, one after the other, the hardware
// foresees them.
template <class Real, class Stored, int kRows>
constexpr int kDotKeys = sizeof(Stored) == 2 && kRows <= 2 ? 1 : smaller(kLanes<Real>, kDecodeTile<Real, kRows>);

// The register tiles of so many rows of query.
TA_INLINE int64_t rows_of_decode_tile(int64_t rows) { return rows <= kFewRowsOfDecode ? 2 : 4; }
template <class Body>
TA_INLINE void for_each_decode_tile(int64_t rows, const Body& body) {
  rows_of_decode_tile(rows) == 2 ? for_each_tile<2>(0, rows, body) : for_each_tile<4>(0, rows, body);
}

// How often the inner loops of the two products run, for LinesAhead::divide: `vectors` of a key or value, of which
// combine takes `wide` at once with few rows, else `narrow`.
template <class Real, class Stored>
TA_INLINE int64_t dot_steps(int64_t rows, int64_t keys, int64_t vectors) {
  const int64_t most = rows_of_decode_tile(rows),
                at_once = most == 2 ? kDotKeys<Real, Stored, 2> : kDotKeys<Real, Stored, 4>;
  return round_up(keys, kLanes<Real>) / at_once * vectors * ((rows + most - 1) / most);
}
TA_INLINE int64_t combine_steps(int64_t rows, int64_t keys, int64_t vectors, int64_t wide, int64_t narrow) {
  const int64_t most = rows_of_decode_tile(rows);
  return keys * larger<int64_t>(vectors / (most == 2 ? wide : narrow), 1) * ((rows + most - 1) / most);
}

// scores[row · kDecodeKeys + key] = query[row] · keys[key] for kRows rows of query and as many keys as lanes; dim is a
// multiple of the lanes, too.
template <class Real, class Stored, int kRows>
TA_NOINLINE void decode_dots(const Real* query, StoredRows<Stored> keys, int64_t dim, Real* scores, LinesAhead& lines) {
  constexpr int n = kLanes<Real>;
  LinesAhead ahead = lines;  // in registers
  constexpr int kAtOnce = kDotKeys<Real, Stored, kRows>;
  Vec<Real> partial[kRows][n];
  for (int i0 = 0; i0 < n; i0 += kAtOnce) {
    Vec<Real> acc[kRows][kAtOnce] = {};
    const Stored* row = keys.data + i0 * keys.stride;
    for (int64_t d = 0; d < dim; d += n) {
      ahead.ask();
      Vec<Real> q[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) q[r] = load(query + r * dim + d);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const Vec<Real> k = load_as(row + i * keys.stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][i] += q[r] * k;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) partial[r][i0 + i] = acc[r][i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store(scores + r * kDecodeKeys, sums_of_lanes<Real>(partial[r]));
  lines = ahead;
}

// out[row][column] = out[row][column] · rescale[row] + Σ_key weights[row][key] · values[key][column], for kRows rows
// and kVectors vectors of columns.
template <class Real, class Stored, int kRows, int kVectors>
TA_NOINLINE void decode_combine(const Real* weights, StoredRows<Stored> values, int64_t count, const Real* rescale,
                                Real* out, int64_t out_stride, LinesAhead& lines) {
  constexpr int n = kLanes<Real>;
  LinesAhead ahead = lines;
  Vec<Real> acc[kRows][kVectors] = {};
  for (int64_t key = 0; key < count; ++key) {
    ahead.ask();
    Vec<Real> weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = splat(weights[r * kDecodeKeys + key]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vec<Real> value = load_as(values.data + key * values.stride + i * n);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][i] += weight[r] * value;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      Real* place = out + r * out_stride + i * n;
      store(place, load(place) * rescale[r] + acc[r][i]);
    }
  }
  lines = ahead;
}

// Both products for one (batch, key/value head) and all rows that read it.
template <class RealType, class Stored>
struct DecodeVectors {
  using Real = RealType;
  static constexpr int kLaneCount = kLanes<Real>;
  static constexpr int64_t kKeys = kDecodeKeys;
  static constexpr bool kAsksBesideSoftmax = false;
  static constexpr bool kWeighs = false;
  static constexpr int64_t kRowGranule = 1;
  static constexpr int64_t kColumnGranule = kLaneCount;

  const AttentionProblem& p;
  int64_t batch, kv_head, rows, query_dim, value_dim;
  Real* query;
  Stored *key_scratch, *value_scratch;

  DecodeVectors(const AttentionProblem& problem, int64_t batch_index, int64_t head_index, int64_t row_count,
                Scratch& scratch)
      : p(problem),
        batch(batch_index),
        kv_head(head_index),
        rows(row_count),
        query_dim(round_up(p.head_dim, kLaneCount)),
        value_dim(round_up(p.value_dim, kLaneCount)),
        query(scratch.take<Real>(rows * query_dim)),
        key_scratch(scratch.take<Stored>(kDecodeKeys * query_dim)),
        value_scratch(scratch.take<Stored>(kDecodeKeys * value_dim)) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = kv_head * (p.heads / p.kv_heads) + row / p.query_length;
      load_rows(query + row * query_dim, query_dim, p.query, element(p.query, batch, head, row % p.query_length), 1,
                p.head_dim);
    }
  }

  // scores[row][key] for the block of keys. The lines ahead are asked for as it goes.
  void dots(int64_t key, int64_t keys, Real* scores, LinesAhead& ahead) {
    const StoredRows<Stored> key_rows = block_rows(p.key, key, keys, p.head_dim, key_scratch);
    ahead.divide(dot_steps<Real, Stored>(rows, keys, query_dim / kLaneCount));
    for (int64_t j = 0; j < keys; j += kLaneCount) {  // outside: these keys stay in the L1 cache for all rows
      for_each_decode_tile(rows, [&]<int kRows>(int64_t row) TA_INLINE_LAMBDA {
        decode_dots<Real, Stored, kRows>(query + row * query_dim,
                                         {key_rows.data + j * key_rows.stride, key_rows.stride}, query_dim,
                                         scores + row * kDecodeKeys + j, ahead);
      });
    }
  }

  // out[row] = out[row] · rescale[row] + weights[row] · values.
  void combine(int64_t key, int64_t keys, const Real* weights, const Real* rescale, Real* out, int64_t out_stride,
               LinesAhead& ahead) {
    const StoredRows<Stored> values = block_rows(p.value, key, keys, p.value_dim, value_scratch);
    const int64_t vectors = value_dim / kLaneCount;
    int64_t vector = 0;
    constexpr int kWide = kDecodeTile<Real, 2>, kNarrow = kDecodeTile<Real, 4>;
    ahead.divide(combine_steps(rows, keys, vectors, kWide, kNarrow));
    const auto cover = [&]<int kMostRows, int kVectors>() TA_INLINE_LAMBDA {
      for (; vector + kVectors <= vectors; vector += kVectors) {
        const int64_t column = vector * kLaneCount;
        for_each_tile<kMostRows>(0, rows, [&]<int kRows>(int64_t row) TA_INLINE_LAMBDA {
          decode_combine<Real, Stored, kRows, kVectors>(weights + row * kDecodeKeys,
                                                        {values.data + column, values.stride}, keys, rescale + row,
                                                        out + row * out_stride + column, out_stride, ahead);
        });
      }
    };
    if (rows <= kFewRowsOfDecode) cover.template operator()<2, kWide>();
    cover.template operator()<4, kNarrow>();
    cover.template operator()<4, 1>();
  }

 private:
  // Rows [row, row + count) of the head: in place where they come in whole vectors, else copied and padded with zeros.
  StoredRows<Stored> block_rows(const TensorView& view, int64_t row, int64_t count, int64_t columns,
                                Stored* scratch) const {
    if (count % kLaneCount == 0 && columns % kLaneCount == 0 && is_one_run(view, row, count))
      return {reinterpret_cast<const Stored*>(element(view, batch, kv_head, row)), view.stride[2]};
    const int64_t stride = round_up(columns, kLaneCount), all_rows = round_up(count, kLaneCount);
    if (all_rows != count || stride != columns)
      __builtin_memset(static_cast<void*>(scratch), 0, all_rows * stride * sizeof(Stored));
    for_each_run(view, batch, kv_head, row, count, [&](const char* first, int64_t run, int64_t run_rows) {
      const auto* from = reinterpret_cast<const Stored*>(first);
      for (int64_t i = 0; i < run_rows && columns > 0; ++i)
        __builtin_memcpy(scratch + (run + i) * stride, from + i * view.stride[2], columns * sizeof(Stored));
    });
    return {scratch, stride};
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
