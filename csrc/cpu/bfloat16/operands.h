// From a tensor's rows to the operands of tile products: bfloat16 in the layouts of layouts.h, other numbers in pieces.
// Included by forward_stages.h and walk.h.
//
// A Source is rows [row, row + rows) of one head, padded with zeros to all_rows × all_columns, multiples of 32 (but for
// all_rows where only `lanes` is called). memory holds all_rows × all_columns of each piece and stays in use. Where a
// number in pieces is infinite, *infinite becomes true, and products are of no use.
//   by_rows()                            A, whose sum runs over the columns
//   by_columns(out, pairs)               A, transposed: the sum runs over the rows
//   lanes(out, piece_stride, row, lanes) B, a panel of rows: [column / 2][lane][column % 2]
//   row_pairs(out, piece_stride)         B, whose sum runs over the rows: [row pair][column][2], of rows kLanesApart
//                                        apart
#pragma once

#include <type_traits>

#include "split_operands.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

class HalfSource {
 public:
  TA_INLINE HalfSource(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns,
                       int64_t all_rows, int64_t all_columns, uint16_t* memory, bool* /*infinite*/)
      : rows_(half_rows(view, batch, head, row, rows, columns, all_rows, all_columns, memory)),
        all_rows_(all_rows),
        all_columns_(all_columns) {}

  TA_INLINE TileOperand by_rows() const { return {rows_.data, rows_.stride * 2, kTileDepth * 2}; }

  TA_INLINE TileOperand by_columns(uint16_t* out, uint16_t* pairs) const {
    transpose_rows(out, rows_, all_rows_, all_columns_, pairs);
    return {out, all_rows_ * 2, kTileDepth * 2};
  }

  TA_INLINE void lanes(uint16_t* out, int64_t /*piece_stride*/, int64_t row, int64_t lanes) const {
    pack_pairs(out, lanes, {rows_.data + row * rows_.stride, rows_.stride}, all_rows_ - row, all_columns_);
  }

  TA_INLINE void row_pairs(uint16_t* out, int64_t /*piece_stride*/) const {
    pair_rows(out, rows_, all_rows_, all_columns_);
  }

 private:
  HalfRows rows_;
  int64_t all_rows_, all_columns_;
};

template <class Stored>
using Source = std::conditional_t<kPiecesOf<Stored> == 1, HalfSource, SplitSource<Stored>>;

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
