// The layouts of the operands that products of bfloat16 read, and what makes them. Included by the two kinds of tile
// products, amx_tiles.h and dot_tiles.h.
//
// A tile product adds A (16 × 32) times B (32 × 16) to C (16 × 16, float). A lies in memory by rows. B lies in pairs:
// two consecutive rows interleaved, so that each 32-bit element holds two neighbours along the summed dimension. C lies
// by rows. Of numbers in pieces (pieces.h), A and B are as many such matrices.
#pragma once

#include "../pack.h"
#include "pieces.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kTileSide = 16;   // rows and columns of C
constexpr int64_t kTileDepth = 32;  // summed elements per product

// An operand's address and how far apart, in bytes, its tile rows, its successive tiles along the sum, and its numbers'
// pieces are.
struct TileOperand {
  const void* data;
  int64_t row_bytes;
  int64_t step_bytes;
  int64_t piece_bytes = 0;

  // The same from a tile row or a number along the sum (a multiple of kTileDepth) on.
  TA_INLINE TileOperand from_row(int64_t row) const { return moved(row * row_bytes); }
  TA_INLINE TileOperand from_depth(int64_t number) const { return moved(number / kTileDepth * step_bytes); }

  TA_INLINE const char* tile(int64_t step, int64_t byte_offset, int piece = 0) const {
    return static_cast<const char*>(data) + piece * piece_bytes + step * step_bytes + byte_offset;
  }
  TA_INLINE TileOperand moved(int64_t bytes) const {
    return {static_cast<const char*>(data) + bytes, row_bytes, step_bytes, piece_bytes};
  }
};

// What is done beside a tile product, in so many parts a step, comes in its slots: how many parts are done before one.
constexpr int parts_before(int slot, int slots, int parts) { return slot * parts / slots; }

// What is done beside a tile product: nothing.
struct NothingBeside {
  template <int kSlot, int kSlots>
  TA_INLINE void slot() const {}
};

template <class First, class Second>
struct BothBeside {
  First& first;
  Second& second;
  template <int kSlot, int kSlots>
  TA_INLINE void slot() const {
    first.template slot<kSlot, kSlots>();
    second.template slot<kSlot, kSlots>();
  }
};

// bfloat16 rows, whose stride counts elements.
struct HalfRows {
  const uint16_t* data;
  int64_t stride;
};

// Copies rows [row, row + rows) of one head to out, all_rows × all_columns, padded with zeros.
TA_INLINE void copy_half_rows(uint16_t* out, const TensorView& view, int64_t batch, int64_t head, int64_t row,
                              int64_t rows, int64_t columns, int64_t all_rows, int64_t all_columns) {
  for_each_run(view, batch, head, row, rows, [&](const char* first, int64_t run, int64_t count) {
    const auto* from = reinterpret_cast<const uint16_t*>(first);
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* to = out + (run + i) * all_columns;
      if (columns > 0) __builtin_memcpy(to, from + i * view.stride[2], columns * sizeof(uint16_t));
      if (columns < all_columns) __builtin_memset(to + columns, 0, (all_columns - columns) * sizeof(uint16_t));
    }
  });
  if (rows < all_rows)
    __builtin_memset(out + rows * all_columns, 0, (all_rows - rows) * all_columns * sizeof(uint16_t));
}

// Rows [row, row + rows) of one head as all_rows × all_columns bfloat16, padded with zeros: in place where nothing
// needs padding and rows can be read as pairs, else copied into scratch (all_rows × all_columns).
TA_INLINE HalfRows half_rows(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                             int64_t columns, int64_t all_rows, int64_t all_columns, uint16_t* scratch) {
  if (rows == all_rows && columns == all_columns && is_one_run(view, row, rows)) {
    const auto* first = reinterpret_cast<const uint16_t*>(element(view, batch, head, row));
    const bool paired = view.stride[2] % 2 == 0 && reinterpret_cast<uintptr_t>(first) % 4 == 0;
    if (paired) return {first, view.stride[2]};
  }
  copy_half_rows(scratch, view, batch, head, row, rows, columns, all_rows, all_columns);
  return {scratch, all_columns};
}

// Two neighbours along a row, as one element of a pair layout.
typedef uint16_t HalfVec __attribute__((vector_size(64)));
typedef uint16_t HalfVecUnaligned __attribute__((vector_size(64), aligned(2), may_alias));

// out[i / 2][column][i % 2] = rows[i][column]; rows and columns are multiples of 2 and 32.
TA_NOINLINE inline void pair_rows(uint16_t* out, HalfRows in, int64_t rows, int64_t columns) {
  HalfVec low{}, high{};
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<uint16_t>((i & 1) * 32 + i / 2);
    high[i] = static_cast<uint16_t>((i & 1) * 32 + i / 2 + 16);
  }
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < columns; j += 32) {
      const HalfVec a = *reinterpret_cast<const HalfVecUnaligned*>(in.data + i * in.stride + j);
      const HalfVec b = *reinterpret_cast<const HalfVecUnaligned*>(in.data + (i + 1) * in.stride + j);
      uint16_t* place = out + i * columns + 2 * j;
      *reinterpret_cast<HalfVecUnaligned*>(place) = __builtin_shuffle(a, b, low);
      *reinterpret_cast<HalfVecUnaligned*>(place + 32) = __builtin_shuffle(a, b, high);
    }
  }
}

// out[column][row] = in[row][column] as bfloat16, for rows and columns that are multiples of 32: an A operand whose sum
// runs over the rows. pairs holds rows × columns.
TA_INLINE void transpose_rows(uint16_t* out, HalfRows in, int64_t rows, int64_t columns, uint16_t* pairs) {
  pair_rows(pairs, in, rows, columns);
  pack_panel(reinterpret_cast<float*>(out), rows / 2, reinterpret_cast<const float*>(pairs), columns, rows / 2,
             columns);
}

// Rows as lanes: out[column / 2][lane][column % 2] for `lanes` lanes, those from rows on zero. A B operand whose sum
// runs over the columns.
TA_INLINE void pack_pairs(uint16_t* out, int64_t lanes, HalfRows in, int64_t rows, int64_t columns) {
  pack_panel(reinterpret_cast<float*>(out), lanes, reinterpret_cast<const float*>(in.data), in.stride / 2, rows,
             columns / 2);
}

// Lane by lane: the bfloat16 of first next to that of second.
TA_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second, uint32_t kept = ~0u) {
  HalfVec order{};
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>((i & 1) * 16 + i / 2);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return _mm512_maskz_permutexvar_epi16(kept, (__m512i)order, halves);
}
// The bfloat16 of low's lanes, then of high's.
TA_INLINE void store_halves(uint16_t* out, Vec<float> low, Vec<float> high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
// The same of what dropout keeps: a bit for each element of out.
TA_INLINE void store_halves(uint16_t* out, Vec<float> low, Vec<float> high, uint32_t kept) {
  _mm512_storeu_si512(out, (__m512i)_mm512_maskz_cvtne2ps_pbh(kept, high, low));
}

// Lane by lane: first next to second, as bfloat16 or, piece_stride apart, in pieces.
template <class Stored = BFloat16>
TA_INLINE void store_pairs(uint16_t* out, int64_t piece_stride, Vec<float> first, Vec<float> second) {
  if constexpr (kPiecesOf<Stored> == 1) {
    _mm512_storeu_si512(out, pairs_of(first, second));
    return;
  }
#pragma GCC unroll 3
  for (int piece = 0; piece < kPiecesOf<Stored>; ++piece)
    _mm512_storeu_si512(out + piece * piece_stride, upper_halves(take_piece(first), take_piece(second)));
}
// The same of what dropout keeps: a bit for each element of out.
template <class Stored>
TA_INLINE void store_pairs(uint16_t* out, int64_t piece_stride, Vec<float> first, Vec<float> second, uint32_t kept) {
  if constexpr (kPiecesOf<Stored> == 1) {
    _mm512_storeu_si512(out, pairs_of(first, second, kept));
    return;
  }
#pragma GCC unroll 3
  for (int piece = 0; piece < kPiecesOf<Stored>; ++piece) {
    const __m512i pairs = upper_halves(take_piece(first), take_piece(second));
    _mm512_storeu_si512(out + piece * piece_stride, _mm512_maskz_mov_epi16(kept, pairs));
  }
}
TA_INLINE void store_pairs(uint16_t* out, Vec<float> first, Vec<float> second) {
  store_pairs<BFloat16>(out, 0, first, second);
}

// Rows of a score tile as an A operand, whose sum runs over its 32 lanes, the numbers of two vectors: one after the
// other, or in pieces, alternating. The B operand's pairs of rows (operands.h) must be as far apart.
template <class Stored>
constexpr int kLanesApart = kPiecesOf<Stored> == 1 ? 1 : kLanes<float>;
template <class Stored>
TA_INLINE void store_lanes(uint16_t* out, int64_t piece_stride, Vec<float> low, Vec<float> high) {
  if constexpr (kPiecesOf<Stored> == 1) {
    store_halves(out, low, high);
  } else {
    store_pairs<Stored>(out, piece_stride, low, high);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
