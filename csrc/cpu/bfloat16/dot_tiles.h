// The products of amx_tiles.h without tile registers: `vdpbf16ps` on vectors, which multiplies a pair of A, broadcast
// to all lanes, with 16 pairs of B, and adds both products to a lane of C. Included by tiles.h.
#pragma once

#include "layouts.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Vectors need no set-up.
struct TileSession {
  TA_INLINE TileSession() {}
};

// Products here leave nothing waiting.
struct WaitingSums {
  TA_INLINE void flush() const {}
};

// kRows × kVectors vectors of C, from row m and tile column n of c on. The product starts from zero: adding it to c at
// the end keeps rounding errors of long sums small.
template <int kRows, int kVectors, bool kAccumulate>
TA_INLINE void dot_block(int64_t steps, const TileOperand& a, int64_t m, const TileOperand& b, int64_t n, float* c,
                         int64_t c_stride) {
  constexpr int kPairs = kTileDepth / 2;
  __m512 acc[kRows][kVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const char* rows = a.tile(step, m * a.row_bytes);
    const char* columns = b.tile(step, n * 64);
#pragma GCC unroll 1  // 2: 5 to 15 % slower with a multiply-add in place of each vdpbf16ps
    for (int pair = 0; pair < kPairs; ++pair) {
      __m512bh column[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        column[j] = (__m512bh)_mm512_loadu_si512(columns + pair * b.row_bytes + j * 64);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int32_t element;
        __builtin_memcpy(&element, rows + i * a.row_bytes + pair * 4, sizeof element);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(element);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], row, column[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* place = c + (m + i) * c_stride + (n + j) * kTileSide;
      store(place, kAccumulate ? load(place) + (Vec<float>)acc[i][j] : (Vec<float>)acc[i][j]);
    }
  }
}

// c = a · b, or c += a · b, for m_tiles × n_tiles tiles of c and a sum over `steps` tile depths.
template <bool kAccumulate, PieceProducts kProducts = kOneProduct>
TA_NOINLINE void tile_product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                              int64_t c_stride, const WaitingSums& = {}) {
  static_assert(kProducts.pieces == 1, "several products at this rate would be slower than float32's own");
  // With the same, 12 × 2 vectors are up to 8 % slower, 4 × 4 up to 15 %.
  constexpr int kRows = 8;
  const auto cover = [&]<int kVectors>(int64_t n) TA_INLINE_LAMBDA {
    for (int64_t m = 0; m < m_tiles * kTileSide; m += kRows)
      dot_block<kRows, kVectors, kAccumulate>(steps, a, m, b, n, c, c_stride);
  };
  for (int64_t n = 0; n < n_tiles; n += 2) {
    n + 1 < n_tiles ? cover.template operator()<2>(n) : cover.template operator()<1>(n);
  }
}

constexpr bool kCallsBeside = false;

// The product leaves no unit idle: what could be done beside it is left to whoever calls.
template <bool kAccumulate, PieceProducts kProducts, class Beside>
TA_INLINE void tile_product_beside(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b,
                                   float* c, int64_t c_stride, const WaitingSums&, Beside&) {
  tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
