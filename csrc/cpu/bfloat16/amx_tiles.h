// Matrix products of bfloat16 on AMX's tile registers. Included by tiles.h.
#pragma once

#include "layouts.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Configures this thread's tiles while it lives: all eight are 16 rows of 64 bytes.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" ::: "memory");  // GCC 12 does not know how much of it the instruction reads
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// One tile depth of tile_block: piece product kNumber and those after it.
template <PieceProducts kProducts, int kM, int kN, int kNumber = 0, class Beside>
TA_INLINE void multiply_tiles(const TileOperand& a, int64_t a_offset, const TileOperand& b, int64_t b_offset,
                              int64_t step, Beside& beside) {
  constexpr PieceProducts::Pair now = kProducts[kNumber];
  constexpr auto before = kNumber > 0 ? kProducts[kNumber - 1] : PieceProducts::Pair{-1, -1};
  constexpr bool new_a = now.a != before.a, new_b = now.b != before.b;
  if constexpr (new_a) _tile_loadd(4, a.tile(step, a_offset, now.a), a.row_bytes);
  if constexpr (new_b) _tile_loadd(6, b.tile(step, b_offset, now.b), b.row_bytes);
  constexpr int kSlot = kNumber * kM * kN, kSlots = kProducts.count() * kM * kN;
  _tile_dpbf16ps(0, 4, 6);
  beside.template slot<kSlot, kSlots>();
  if constexpr (kN == 2) {
    if constexpr (new_b) _tile_loadd(7, b.tile(step, b_offset + 64, now.b), b.row_bytes);
    _tile_dpbf16ps(1, 4, 7);
    beside.template slot<kSlot + 1, kSlots>();
  }
  if constexpr (kM == 2) {
    if constexpr (new_a) _tile_loadd(5, a.tile(step, a_offset + kTileSide * a.row_bytes, now.a), a.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    beside.template slot<kSlot + kN, kSlots>();
    if constexpr (kN == 2) {
      _tile_dpbf16ps(3, 5, 7);
      beside.template slot<kSlot + 3, kSlots>();
    }
  }
  if constexpr (kNumber + 1 < kProducts.count()) {
    multiply_tiles<kProducts, kM, kN, kNumber + 1>(a, a_offset, b, b_offset, step, beside);
  }
}

// kM × kN (each 1 or 2) tiles of C. C's tiles are 0 … 3, A's 4 and 5, B's 6 and 7. After each multiplication the vector
// units have nothing to do for 16 cycles: there beside.slot<its number, of so many in a step>() is called. What it does
// must be known at compile time: with a branch that reads memory, which waits for the tiles' loads before it, D 64
// gained nothing.
//
// Three pieces start from zero, and are added to c at the end: six products in each step, rounded to the size of a
// long sum, made float32's output at 16384 keys err by 2.3 times PyTorch's (root mean square).
template <PieceProducts kProducts, int kM, int kN, bool kAccumulate, class Beside>
TA_INLINE void tile_block(int64_t steps, const TileOperand& a, int64_t m, const TileOperand& b, int64_t n, float* c,
                          int64_t c_stride, Beside& beside) {
  constexpr bool kAddsAtEnd = kAccumulate && kProducts.pieces > 2;
  alignas(64) float sums[kAddsAtEnd ? kM * kN * kTileSide * kTileSide : 1];
  float* const place = kAddsAtEnd ? sums : c;
  const int64_t stride = kAddsAtEnd ? kN * kTileSide : c_stride, bytes = stride * 4;
  float* const below = place + kTileSide * stride;
  if constexpr (kAccumulate && !kAddsAtEnd) {
    _tile_loadd(0, place, bytes);
    if constexpr (kN == 2) _tile_loadd(1, place + kTileSide, bytes);
    if constexpr (kM == 2) _tile_loadd(2, below, bytes);
    if constexpr (kM == 2 && kN == 2) _tile_loadd(3, below + kTileSide, bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN == 2) _tile_zero(1);
    if constexpr (kM == 2) _tile_zero(2);
    if constexpr (kM == 2 && kN == 2) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step)
    multiply_tiles<kProducts, kM, kN>(a, m * kTileSide * a.row_bytes, b, n * 64, step, beside);
  _tile_stored(0, place, bytes);
  if constexpr (kN == 2) _tile_stored(1, place + kTileSide, bytes);
  if constexpr (kM == 2) _tile_stored(2, below, bytes);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, below + kTileSide, bytes);
  if constexpr (kAddsAtEnd) {
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < kM * kTileSide; ++i) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kN * kTileSide; j += kLanes<float>) {
        float* sum = c + i * c_stride + j;
        store(sum, load(sum) + load(sums + i * stride + j));
      }
    }
  }
}

constexpr bool kCallsBeside = true;

// c = a · b, or c += a · b, for m_tiles × n_tiles (both even) tiles of c and a sum over `steps` tile depths of numbers
// in pieces.
template <bool kAccumulate, PieceProducts kProducts, class Beside>
TA_INLINE void tile_product_beside(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b,
                                   float* c, int64_t c_stride, Beside& beside) {
  // GCC's tile intrinsics do not tell the compiler that they read and write memory.
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < n_tiles; n += 2) {
    for (int64_t m = 0; m < m_tiles; m += 2) {
      tile_block<kProducts, 2, 2, kAccumulate>(steps, a, m, b, n, c + m * kTileSide * c_stride + n * kTileSide,
                                               c_stride, beside);
    }
  }
  asm volatile("" ::: "memory");
}

// The same with nothing beside it, for any number of tiles.
template <bool kAccumulate, PieceProducts kProducts = kOneProduct>
TA_NOINLINE void tile_product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                              int64_t c_stride) {
  NothingBeside nothing;
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < n_tiles; n += 2) {
    const bool two_columns = n + 1 < n_tiles;
    for (int64_t m = 0; m < m_tiles; m += 2) {
      const bool two_rows = m + 1 < m_tiles;
      float* place = c + m * kTileSide * c_stride + n * kTileSide;
      if (two_rows && two_columns) {
        tile_block<kProducts, 2, 2, kAccumulate>(steps, a, m, b, n, place, c_stride, nothing);
      } else if (two_columns) {
        tile_block<kProducts, 1, 2, kAccumulate>(steps, a, m, b, n, place, c_stride, nothing);
      } else if (two_rows) {
        tile_block<kProducts, 2, 1, kAccumulate>(steps, a, m, b, n, place, c_stride, nothing);
      } else {
        tile_block<kProducts, 1, 1, kAccumulate>(steps, a, m, b, n, place, c_stride, nothing);
      }
    }
  }
  asm volatile("" ::: "memory");
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
