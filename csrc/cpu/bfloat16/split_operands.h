// Operands of tile products (layouts.h) made of numbers in pieces (pieces.h), straight from a tensor's rows. Tiles of A
// are 16 consecutive lines of memory each: from rows 128 or 256 bytes apart, products take 8 % longer. Included by
// operands.h.
#pragma once

#include "layouts.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// See operands.h.
template <class Stored>
class SplitSource {
 public:
  TA_INLINE SplitSource(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns,
                        int64_t all_rows, int64_t all_columns, uint16_t* memory, bool* infinite)
      : view_(view),
        batch_(batch),
        head_(head),
        row_(row),
        rows_(rows),
        columns_(columns),
        all_rows_(all_rows),
        all_columns_(all_columns),
        memory_(memory),
        infinite_(infinite) {
    if (is_one_run(view, row, rows)) first_ = element(view, batch, head, row);
  }

  // [piece][column / 32][row][column % 32]
  TA_NOINLINE TileOperand by_rows() {
    const int64_t piece_stride = all_rows_ * all_columns_;
    for (int64_t i = 0; i < all_rows_; ++i) {
      for (int64_t j = 0; j < all_columns_; j += kTileDepth) {
        store_line(memory_ + j * all_rows_ + i * kTileDepth, piece_stride, load_at(i, j),
                   load_at(i, j + kLanes<float>));
      }
    }
    report();
    return {memory_, kTileDepth * 2, all_rows_ * kTileDepth * 2, piece_stride * 2};
  }

  // [piece][row / 32][column][row % 32]
  TA_NOINLINE TileOperand by_columns(uint16_t* out, uint16_t* /*pairs*/) {
    const int64_t piece_stride = all_rows_ * all_columns_;
    for (int64_t i = 0; i < all_rows_; i += kTileDepth) {
      for (int64_t j = 0; j < all_columns_; j += kLanes<float>) {
        Vec<float> low[kLanes<float>], high[kLanes<float>];
        load_transposed(i, j, low);
        load_transposed(i + kLanes<float>, j, high);
        uint16_t* place = out + i * all_columns_ + j * kTileDepth;
#pragma GCC unroll 1
        for (int k = 0; k < kLanes<float>; ++k) store_line(place + k * kTileDepth, piece_stride, low[k], high[k]);
      }
    }
    report();
    return {out, kTileDepth * 2, all_columns_ * kTileDepth * 2, piece_stride * 2};
  }

  TA_NOINLINE void lanes(uint16_t* out, int64_t piece_stride, int64_t row, int64_t lanes) {
    for (int64_t i = 0; i < lanes; i += kLanes<float>) {
      for (int64_t j = 0; j < all_columns_; j += kLanes<float>) {
        Vec<float> square[kLanes<float>];
        load_transposed(row + i, j, square);
#pragma GCC unroll 1
        for (int k = 0; k < kLanes<float>; k += 2)
          store_pair_line(out + (j + k) * lanes + 2 * i, piece_stride, square[k], square[k + 1]);
      }
    }
    report();
  }

  template <int kApart = kLanesApart<Stored>>
  TA_NOINLINE void row_pairs(uint16_t* out, int64_t piece_stride) {
    for (int64_t i = 0; i < all_rows_; i += 2 * kApart) {
      for (int64_t k = 0; k < kApart; ++k) {
        for (int64_t j = 0; j < all_columns_; j += kLanes<float>) {
          store_pair_line(out + (i + 2 * k) * all_columns_ + 2 * j, piece_stride, load_at(i + k, j),
                          load_at(i + k + kApart, j));
        }
      }
    }
    report();
  }

 private:
  // Stores the pieces of low's and then high's numbers.
  TA_INLINE void store_line(uint16_t* out, int64_t piece_stride, Vec<float> low, Vec<float> high) {
    infinite_lanes_ |= infinite_lanes(low) | infinite_lanes(high);
#pragma GCC unroll 3
    for (int piece = 0; piece < kPiecesOf<Stored>; ++piece) {
      const Vec<float> a = take_piece(low), b = take_piece(high);
      _mm512_storeu_si512(out + piece * piece_stride, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
  }
  // The same of numbers next to each other.
  TA_INLINE void store_pair_line(uint16_t* out, int64_t piece_stride, Vec<float> first, Vec<float> second) {
    infinite_lanes_ |= infinite_lanes(first) | infinite_lanes(second);
    store_pairs<Stored>(out, piece_stride, first, second);
  }
  // Tasks may do so at the same time.
  TA_INLINE void report() const {
    if (infinite_lanes_ != 0) __atomic_store_n(infinite_, true, __ATOMIC_RELAXED);
  }

  // Columns [column, column + 16) of row i.
  TA_INLINE Vec<float> load_at(int64_t i, int64_t column) const {
    const int64_t left = columns_ - column;
    if (i >= rows_ || left <= 0) return Vec<float>{};
    const auto* place = reinterpret_cast<const Stored*>(row_of(i)) + column;
    if (left >= kLanes<float>) return load_as(place);
    const __mmask16 lanes = static_cast<__mmask16>((1u << left) - 1);
    if constexpr (sizeof(Stored) == 4) {
      return _mm512_maskz_loadu_ps(lanes, place);
    } else {
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, place));
    }
  }
  // The same of rows i to i + 15, transposed: a vector for each column.
  TA_INLINE void load_transposed(int64_t i, int64_t column, Vec<float> (&square)[kLanes<float>]) const {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<float>; ++k) square[k] = load_at(i + k, column);
    transpose_in_registers<float>(square);
  }
  TA_INLINE const char* row_of(int64_t i) const {
    if (first_ == nullptr) return element(view_, batch_, head_, row_ + i);
    return first_ + i * view_.stride[2] * static_cast<int64_t>(sizeof(Stored));
  }

  const TensorView& view_;
  int64_t batch_, head_, row_, rows_, columns_, all_rows_, all_columns_;
  uint16_t* memory_;
  bool* infinite_;
  unsigned infinite_lanes_ = 0;
  const char* first_ = nullptr;
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
