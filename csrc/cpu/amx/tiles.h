// Matrix products of bfloat16 on AMX's tile registers, and the layouts that they read. Included by amx/forward.h and
// amx/walk.h, compiled in instantiate/amx.cpp only.
//
// A tile product adds A (16 × 32) times B (32 × 16) to C (16 × 16, float). A lies in memory by rows. B lies in pairs:
// two consecutive rows interleaved, so that each 32-bit element holds two neighbours along the summed dimension. C lies
// by rows.
#pragma once

#include "../convert.h"
#include "../pack.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kTileSide = 16;   // rows and columns of C
constexpr int64_t kTileDepth = 32;  // summed elements per product

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

// An operand's address and how far apart, in bytes, its tile rows and its successive tiles along the sum are.
struct TileOperand {
  const void* data;
  int64_t row_bytes;
  int64_t step_bytes;

  TA_INLINE const char* tile(int64_t step, int64_t byte_offset) const {
    return static_cast<const char*>(data) + step * step_bytes + byte_offset;
  }
};

// What is done beside a tile product: nothing.
struct NothingBeside {
  TA_INLINE void operator()(int64_t) const {}
};

// kM × kN (each 1 or 2) tiles of C. C's tiles are 0 … 3, A's 4 and 5, B's 6 and 7. beside(tiles) is called after each
// step's products, of which there are `tiles`: for 16 cycles each, the vector units have nothing to do.
template <int kM, int kN, bool kAccumulate, class Beside>
TA_INLINE void tile_block(int64_t steps, const TileOperand& a, int64_t m, const TileOperand& b, int64_t n, float* c,
                          int64_t c_stride, Beside& beside) {
  const int64_t c_bytes = c_stride * 4;
  float* c1 = c + kTileSide * c_stride;
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kN == 2) _tile_loadd(1, c + kTileSide, c_bytes);
    if constexpr (kM == 2) _tile_loadd(2, c1, c_bytes);
    if constexpr (kM == 2 && kN == 2) _tile_loadd(3, c1 + kTileSide, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN == 2) _tile_zero(1);
    if constexpr (kM == 2) _tile_zero(2);
    if constexpr (kM == 2 && kN == 2) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a.tile(step, m * kTileSide * a.row_bytes), a.row_bytes);
    _tile_loadd(6, b.tile(step, n * 64), b.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN == 2) {
      _tile_loadd(7, b.tile(step, n * 64 + 64), b.row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kM == 2) {
      _tile_loadd(5, a.tile(step, (m + 1) * kTileSide * a.row_bytes), a.row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kN == 2) _tile_dpbf16ps(3, 5, 7);
    }
    beside(kM * kN);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kN == 2) _tile_stored(1, c + kTileSide, c_bytes);
  if constexpr (kM == 2) _tile_stored(2, c1, c_bytes);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, c1 + kTileSide, c_bytes);
}

// c = a · b, or c += a · b, for m_tiles × n_tiles tiles of c and a sum over `steps` tile depths.
template <bool kAccumulate, class Beside>
TA_INLINE void tile_product_beside(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b,
                                   float* c, int64_t c_stride, Beside& beside) {
  // GCC's tile intrinsics do not tell the compiler that they read and write memory.
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < n_tiles; n += 2) {
    const bool two_columns = n + 1 < n_tiles;
    for (int64_t m = 0; m < m_tiles; m += 2) {
      const bool two_rows = m + 1 < m_tiles;
      float* place = c + m * kTileSide * c_stride + n * kTileSide;
      if (two_rows && two_columns) {
        tile_block<2, 2, kAccumulate>(steps, a, m, b, n, place, c_stride, beside);
      } else if (two_columns) {
        tile_block<1, 2, kAccumulate>(steps, a, m, b, n, place, c_stride, beside);
      } else if (two_rows) {
        tile_block<2, 1, kAccumulate>(steps, a, m, b, n, place, c_stride, beside);
      } else {
        tile_block<1, 1, kAccumulate>(steps, a, m, b, n, place, c_stride, beside);
      }
    }
  }
  asm volatile("" ::: "memory");
}

template <bool kAccumulate>
TA_NOINLINE void tile_product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                              int64_t c_stride) {
  NothingBeside nothing;
  tile_product_beside<kAccumulate>(m_tiles, n_tiles, steps, a, b, c, c_stride, nothing);
}

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

// The bfloat16 of low's lanes, then of high's.
TA_INLINE void store_halves(uint16_t* out, Vec<float> low, Vec<float> high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
// Lane by lane: the bfloat16 of first next to that of second.
TA_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second, uint32_t kept = ~0u) {
  HalfVec order{};
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>((i & 1) * 16 + i / 2);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return _mm512_maskz_permutexvar_epi16(kept, (__m512i)order, halves);
}
TA_INLINE void store_pairs(uint16_t* out, Vec<float> first, Vec<float> second) {
  _mm512_storeu_si512(out, pairs_of(first, second));
}

// The same of what dropout keeps: a bit for each element of out.
TA_INLINE void store_halves(uint16_t* out, Vec<float> low, Vec<float> high, uint32_t kept) {
  _mm512_storeu_si512(out, (__m512i)_mm512_maskz_cvtne2ps_pbh(kept, high, low));
}
TA_INLINE void store_pairs(uint16_t* out, Vec<float> first, Vec<float> second, uint32_t kept) {
  _mm512_storeu_si512(out, pairs_of(first, second, kept));
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
