// A product of a panel's weights with rows of keys or values whose result is complete at once, so that it goes straight
// to where it is stored: lanes run along the result's columns, and nothing is transposed, summed or copied afterwards.
// Included by forward.h and backward_walk.h, for blocks of query rows that meet one block of keys only.
#pragma once

#include "gemm.h"
#include "pack.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Whether store_row_product serves a result of so many columns: the rows that it multiplies are read in whole vectors.
template <class Real>
TA_INLINE bool has_row_product(int64_t columns) {
  return columns > 0 && columns % kLanes<Real> == 0;
}

// out[row][column] = factor[row] · Σ_key weights[key][row] · rows[key][column]; factor null: 1.
template <class Real, int kRows, int kVectors>
TA_NOINLINE void row_product_tile(int64_t keys, const Real* weights, int64_t width, const Real* rows,
                                  int64_t row_stride, const Real* factor, Real* out, int64_t out_stride) {
  Vec<Real> acc[kRows][kVectors] = {};
  multiply_accumulate<Real, kRows, kVectors, Broadcast::kAlongColumn>(acc, keys, weights, width, rows, row_stride);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      store(out + m * out_stride + n * kLanes<Real>, factor == nullptr ? acc[m][n] : acc[m][n] * factor[m]);
    }
  }
}

// The same for query rows [0, row_count) of a panel of that width and all columns, stored to rows [row, …) of a tensor.
// scratch holds row_count × columns.
template <class Real>
TA_NOINLINE void store_row_product(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t row_count,
                                   int64_t columns, int64_t keys, const Real* weights, int64_t width, Rows<Real> rows,
                                   const Real* factor, Real* scratch) {
  char* first = element(view, batch, head, row);
  const bool in_place = view.dtype == kStoredAs<Real>;
  Real* out = in_place ? reinterpret_cast<Real*>(first) : scratch;
  const int64_t out_stride = in_place ? view.stride[2] : columns;
  for_each_tile<kGradientRows>(0, row_count, [&]<int kRows>(int64_t i) {
    for_each_piece<Real>(columns, [&]<int kVectors>(int64_t column) TA_INLINE_LAMBDA {
      row_product_tile<Real, kRows, kVectors>(keys, weights + i, width, rows.data + column, rows.stride,
                                              factor == nullptr ? nullptr : factor + i, out + i * out_stride + column,
                                              out_stride);
    });
  });
  if (!in_place) store_rows(view, first, scratch, columns, row_count, columns);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
