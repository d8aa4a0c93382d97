// The three matrix products of attention, each on one register tile at a time: included by forward.h and backward.h.
//
// Scores are kept transposed, one row per key and one lane per query row ("panel" = kVectors vectors of lanes). So keys
// and values are read as they lie in memory, one element broadcast to all lanes; maxima and sums run over registers,
// not across lanes; and the weights that leave the softmax are already in the layout that the second product reads.
#pragma once

#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Rows of a register tile for a panel of so many vectors.
template <int kVectors>
constexpr int kTileRows = TA_VECTOR_BYTES == 64 ? (kVectors == 3   ? 8
                                                   : kVectors == 2 ? 12
                                                                   : 16)
                                                : (kVectors == 3   ? 4
                                                   : kVectors == 2 ? 6
                                                                   : 8);

enum class Broadcast { kAlongRow, kAlongColumn };

// acc[m][:] += Σ_k a(m, k) · b[k][:], where a(m, k) is a[m · a_stride + k] (kAlongRow) or a[k · a_stride + m].
template <class Real, int kRows, int kVectors, Broadcast kBroadcast>
TA_INLINE void multiply_accumulate(Vec<Real> (&acc)[kRows][kVectors], int64_t count, const Real* __restrict a,
                                   int64_t a_stride, const Real* __restrict b, int64_t b_stride) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k) {
    Vec<Real> row[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes<Real>);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<Real> element = splat(kBroadcast == Broadcast::kAlongRow ? a[m * a_stride + k] : a[k * a_stride + m]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) acc[m][n] += element * row[n];
    }
    b += b_stride;
  }
}

// Calls body.template operator()<kRows>(first) for consecutive tiles that cover [begin, end), the largest first.
template <int kRows, class Body>
TA_INLINE void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kRows <= end; begin += kRows) body.template operator()<kRows>(begin);
  if constexpr (kRows > 1) {
    if (begin < end) for_each_tile<(kRows > 4 ? 4 : kRows / 2)>(begin, end, body);
  }
}

// What dots are turned into before they leave the registers: here, multiplied by a factor.
template <class Real>
struct ScaledDots {
  Real factor;

  TA_INLINE bool changes_them() const { return factor != 1; }
  TA_INLINE Vec<Real> operator()(Vec<Real> dots, int64_t /*key*/, int64_t /*lane*/) const { return dots * factor; }
};

// What runs before each register tile of a product: by default, nothing.
struct NothingBetween {
  TA_INLINE void operator()() const {}
};

// Dots of kRows keys, of which the first is the block's number key, with a panel of queries, and what finish makes of
// them; maximum[lane] is raised to include them if it is not null.
template <class Real, int kRows, int kVectors, bool kTrackMaximum, class Finish>
TA_NOINLINE void dot_tile(int64_t dim, const Real* keys, int64_t key_stride, const Real* panel, const Finish& finish,
                          int64_t key, Real* out, Real* maximum) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> acc[kRows][kVectors] = {};
  multiply_accumulate<Real, kRows, kVectors, Broadcast::kAlongRow>(acc, dim, keys, key_stride, panel, width);
  if (finish.changes_them()) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) acc[m][n] = finish(acc[m][n], key + m, n * n_lanes);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    Vec<Real> highest{};
    if (kTrackMaximum) highest = load(maximum + n * n_lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      if (kTrackMaximum) highest = max(highest, acc[m][n]);
      store(out + m * width + n * n_lanes, acc[m][n]);
    }
    if (kTrackMaximum) store(maximum + n * n_lanes, highest);
  }
}

// out[key][lane] = finish(keys[key]·panel[lane]) for keys in [begin, end).
template <class Real, int kVectors, bool kTrackMaximum, class Finish, class Between = NothingBetween>
TA_INLINE void dot_rows(int64_t begin, int64_t end, int64_t dim, const Real* keys, int64_t key_stride,
                        const Real* panel, const Finish& finish, Real* out, Real* maximum,
                        const Between& between = {}) {
  constexpr int width = kVectors * kLanes<Real>;
  for_each_tile<kTileRows<kVectors>>(begin, end, [&]<int kRows>(int64_t key) TA_INLINE_LAMBDA {
    between();
    dot_tile<Real, kRows, kVectors, kTrackMaximum>(dim, keys + key * key_stride, key_stride, panel, finish, key,
                                                   out + key * width, maximum);
  });
}

// out[column][lane] = out[column][lane] · rescale[lane] + Σ_key values[key][column] · weights[key][lane] for kRows
// columns. The block's own sum starts from zero: adding it to the total at the end keeps rounding errors of long rows
// small.
template <class Real, int kRows, int kVectors, bool kRescale>
TA_NOINLINE void combine_tile(int64_t keys, const Real* values, int64_t value_stride, const Real* weights, Real* out,
                              const Real* rescale) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> acc[kRows][kVectors] = {};
  multiply_accumulate<Real, kRows, kVectors, Broadcast::kAlongColumn>(acc, keys, values, value_stride, weights, width);
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    Vec<Real> factor{};
    if (kRescale) factor = load(rescale + n * n_lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      Real* place = out + m * width + n * n_lanes;
      store(place, kRescale ? load(place) * factor + acc[m][n] : load(place) + acc[m][n]);
    }
  }
}

// The same for all columns [0, columns): attention's second product, and dQᵀ = Kᵀ·dS.
template <class Real, int kVectors, bool kRescale, class Between = NothingBetween>
TA_INLINE void combine_rows(int64_t columns, int64_t keys, const Real* values, int64_t value_stride,
                            const Real* weights, Real* out, const Real* rescale, const Between& between = {}) {
  constexpr int width = kVectors * kLanes<Real>;
  for_each_tile<kTileRows<kVectors>>(0, columns, [&]<int kRows>(int64_t column) TA_INLINE_LAMBDA {
    between();
    combine_tile<Real, kRows, kVectors, kRescale>(keys, values + column, value_stride, weights, out + column * width,
                                                  rescale);
  });
}

// A block of matrices [key][lane], one per panel, that all hold key rows of the same block.
template <class Real>
struct PanelTiles {
  const Real* data;  // panel i starts at offset[i] · keys_per_tile
  int64_t keys_per_tile;
};

// Register tile of the gradient products: lanes run along the columns of key or value.
constexpr int kGradientRows = 6;
constexpr int kGradientVectors = TA_VECTOR_BYTES == 64 ? 4 : 2;

// Calls body.template operator()<kVectors>(first column) for near-equal pieces of columns, a multiple of the vector
// length.
template <class Real, class Body>
TA_INLINE void for_each_piece(int64_t columns, const Body& body) {
  const int64_t vectors = columns / kLanes<Real>, pieces = (vectors + kGradientVectors - 1) / kGradientVectors;
  int64_t column = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t share = (vectors * (piece + 1)) / pieces - (vectors * piece) / pieces;
    if constexpr (kGradientVectors == 4) {
      if (share == 4) body.template operator()<4>(column);
      if (share == 3) body.template operator()<3>(column);
    }
    if (share == 2) body.template operator()<2>(column);
    if (share == 1) body.template operator()<1>(column);
    column += share * kLanes<Real>;
  }
}

// sums[key][column] += Σ_row tiles[key][row] · rows[row][column] over the query rows of panels [first, last).
template <class Real, int kRows, int kVectors>
TA_NOINLINE void gradient_tile(const Panels& panels, int first, int last, PanelTiles<Real> tiles, int64_t key,
                               int64_t row_count, const Real* rows, int64_t row_stride, Real* sums,
                               int64_t sum_stride) {
  Vec<Real> acc[kRows][kVectors] = {};
  for (int i = first; i < last; ++i) {
    const int64_t offset = panels.offset[i], width = panels.vectors[i] * kLanes<Real>;
    multiply_accumulate<Real, kRows, kVectors, Broadcast::kAlongRow>(
        acc, smaller(width, row_count - offset), tiles.data + offset * tiles.keys_per_tile + key * width, width,
        rows + offset * row_stride, row_stride);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      Real* place = sums + m * sum_stride + n * kLanes<Real>;
      store(place, load(place) + acc[m][n]);
    }
  }
}

// The same for the keys [0, keys) of a block and all columns, a multiple of the vector length: dV = Pᵀ·dO, dK = dSᵀ·Q.
// begin[i] and end[i] bound the keys that panel i attends; neither falls as i grows, except where they are equal
// (none).
template <class Real>
TA_NOINLINE void accumulate_gradient(const Panels& panels, const int64_t* begin, const int64_t* end, int64_t keys,
                                     int64_t columns, PanelTiles<Real> tiles, int64_t row_count, const Real* rows,
                                     int64_t row_stride, Real* sums, int64_t sum_stride) {
  for_each_tile<kGradientRows>(0, keys, [&]<int kRows>(int64_t key) {
    int first = 0, last = panels.count;
    while (first < last && end[first] <= key) ++first;
    while (last > first && (begin[last - 1] >= key + kRows || end[last - 1] <= key)) --last;
    if (first == last) return;
    for_each_piece<Real>(columns, [&]<int kVectors>(int64_t column) TA_INLINE_LAMBDA {
      gradient_tile<Real, kRows, kVectors>(panels, first, last, tiles, key, row_count, rows + column, row_stride,
                                           sums + key * sum_stride + column, sum_stride);
    });
  });
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
