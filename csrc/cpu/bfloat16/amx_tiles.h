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

// C's tiles are 0 … 3, A's 4 and 5, B's 6 and 7.
template <int kTile>
TA_INLINE void load_sums(const float* place, int64_t bytes) {
  if constexpr (kTile == 0) _tile_loadd(0, place, bytes);
  if constexpr (kTile == 1) _tile_loadd(1, place, bytes);
  if constexpr (kTile == 2) _tile_loadd(2, place, bytes);
  if constexpr (kTile == 3) _tile_loadd(3, place, bytes);
}
template <int kTile>
TA_INLINE void store_sums(float* place, int64_t bytes) {
  if constexpr (kTile == 0) _tile_stored(0, place, bytes);
  if constexpr (kTile == 1) _tile_stored(1, place, bytes);
  if constexpr (kTile == 2) _tile_stored(2, place, bytes);
  if constexpr (kTile == 3) _tile_stored(3, place, bytes);
}
template <int kTile>
TA_INLINE void clear_sums() {
  if constexpr (kTile == 0) _tile_zero(0);
  if constexpr (kTile == 1) _tile_zero(1);
  if constexpr (kTile == 2) _tile_zero(2);
  if constexpr (kTile == 3) _tile_zero(3);
}

// c += kM × kN tiles of sums that have just been stored, one row of tiles below the other.
template <int kM, int kN>
TA_INLINE void add_stored_sums(const float* sums, float* c, int64_t c_stride) {
  asm volatile("" ::: "memory");
  for (int64_t i = 0; i < kM * kTileSide; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kN * kTileSide; j += kLanes<float>) {
      float* sum = c + i * c_stride + j;
      store(sum, load(sum) + load(sums + i * kN * kTileSide + j));
    }
  }
}

// The sums of the last 2 × 2 tiles of a product, in their registers. They are stored one by one between the next
// block's first multiplications: a store waits for its tile's last multiplication, and four of them in a row fill the
// scheduler, so that no multiplication starts meanwhile. Eight multiplications and four stores take 39 ns this way, 54
// one after the other; with sums that are loaded, too, 51 and 68, or 76 and 104 where they lie in the L2 cache.
class WaitingSums {
 public:
  // Until then nothing may read or write where the sums go but tile products.
  TA_NOINLINE void flush() {
    if (place_ == nullptr) return;
    store<0>(), store<1>(), store<2>(), store<3>();
    place_ = nullptr;
    add();
  }
  template <int kTile>
  TA_INLINE void store() const {
    if (place_ != nullptr)
      store_sums<kTile>(place_ + kTile / 2 * kTileSide * stride_ + kTile % 2 * kTileSide, stride_ * 4);
  }
  // The registers' sums go to c, or are added to what is there.
  TA_INLINE void wait(float* c, int64_t c_stride) { place_ = c, stride_ = c_stride; }
  TA_INLINE void wait_to_add(float* c, int64_t c_stride) {
    place_ = memory_, stride_ = 2 * kTileSide, sum_ = c, sum_stride_ = c_stride;
  }
  // After all four stores: adds them to what they were to be added to.
  TA_INLINE void add() {
    if (sum_ == nullptr) return;
    add_stored_sums<2, 2>(memory_, sum_, sum_stride_);
    sum_ = nullptr;
  }

 private:
  float *place_ = nullptr, *sum_ = nullptr;
  int64_t stride_ = 0, sum_stride_ = 0;
  alignas(64) float memory_[4 * kTileSide * kTileSide];
};

// One tile depth of a block: piece product kNumber and those after it. open.tile<i>() comes before the first
// multiplication into C's tile i.
template <PieceProducts kProducts, int kM, int kN, int kNumber = 0, class Open, class Beside>
TA_INLINE void multiply_tiles(const TileOperand& a, int64_t a_offset, const TileOperand& b, int64_t b_offset,
                              int64_t step, const Open& open, Beside& beside) {
  constexpr PieceProducts::Pair now = kProducts[kNumber];
  constexpr auto before = kNumber > 0 ? kProducts[kNumber - 1] : PieceProducts::Pair{-1, -1};
  constexpr bool new_a = now.a != before.a, new_b = now.b != before.b, opens = kNumber == 0;
  if constexpr (new_a) _tile_loadd(4, a.tile(step, a_offset, now.a), a.row_bytes);
  if constexpr (new_b) _tile_loadd(6, b.tile(step, b_offset, now.b), b.row_bytes);
  constexpr int kSlot = kNumber * kM * kN, kSlots = kProducts.count() * kM * kN;
  if constexpr (opens) open.template tile<0>();
  _tile_dpbf16ps(0, 4, 6);
  beside.template slot<kSlot, kSlots>();
  if constexpr (kN == 2) {
    if constexpr (new_b) _tile_loadd(7, b.tile(step, b_offset + 64, now.b), b.row_bytes);
    if constexpr (opens) open.template tile<1>();
    _tile_dpbf16ps(1, 4, 7);
    beside.template slot<kSlot + 1, kSlots>();
  }
  if constexpr (kM == 2) {
    if constexpr (new_a) _tile_loadd(5, a.tile(step, a_offset + kTileSide * a.row_bytes, now.a), a.row_bytes);
    if constexpr (opens) open.template tile<2>();
    _tile_dpbf16ps(2, 5, 6);
    beside.template slot<kSlot + kN, kSlots>();
    if constexpr (kN == 2) {
      if constexpr (opens) open.template tile<3>();
      _tile_dpbf16ps(3, 5, 7);
      beside.template slot<kSlot + 3, kSlots>();
    }
  }
  if constexpr (kNumber + 1 < kProducts.count()) {
    multiply_tiles<kProducts, kM, kN, kNumber + 1>(a, a_offset, b, b_offset, step, open, beside);
  }
}

// Before the first multiplications of a block: what waits is stored, and the sums start.
template <bool kLoads>
struct OpenBlock {
  const WaitingSums& waiting;
  const float* c;
  int64_t c_stride;

  template <int kTile>
  TA_INLINE void tile() const {
    waiting.store<kTile>();
    if constexpr (kLoads) {
      load_sums<kTile>(c + kTile / 2 * kTileSide * c_stride + kTile % 2 * kTileSide, c_stride * 4);
    } else {
      clear_sums<kTile>();
    }
  }
};
struct OpenedBefore {
  template <int kTile>
  TA_INLINE void tile() const {}
};

// How sums of three pieces are added: they start from zero, and are added to c at the end. Six products in each step,
// rounded to the size of a long sum, made float32's output at 16384 keys err by 2.3 times PyTorch's (root mean square).
template <PieceProducts kProducts, bool kAccumulate>
constexpr bool kAddsAtEnd = kAccumulate && kProducts.pieces > 2;

// 2 × 2 tiles of C, which wait when this returns. After each multiplication the vector units have nothing to do for 16
// cycles: there beside.slot<its number, of so many in a step>() is called. What it does must be known at compile time:
// with a branch that reads memory, which waits for the tiles' loads before it, D 64 gained nothing.
template <PieceProducts kProducts, bool kAccumulate, class Beside>
TA_INLINE void square_block(int64_t steps, const TileOperand& a, int64_t m, const TileOperand& b, int64_t n, float* c,
                            int64_t c_stride, WaitingSums& waiting, Beside& beside) {
  constexpr bool kAdds = kAddsAtEnd<kProducts, kAccumulate>, kLoads = kAccumulate && !kAdds;
  const int64_t a_offset = m * kTileSide * a.row_bytes, b_offset = n * 64;
  const OpenBlock<kLoads> open{waiting, c, c_stride};
  multiply_tiles<kProducts, 2, 2>(a, a_offset, b, b_offset, 0, open, beside);
  for (int64_t step = 1; step < steps; ++step)
    multiply_tiles<kProducts, 2, 2>(a, a_offset, b, b_offset, step, OpenedBefore(), beside);
  waiting.add();
  kAdds ? waiting.wait_to_add(c, c_stride) : waiting.wait(c, c_stride);
}

// kM × kN (each 1 or 2, not both 2) tiles of C at a product's edge.
template <PieceProducts kProducts, int kM, int kN, bool kAccumulate>
TA_INLINE void edge_block(int64_t steps, const TileOperand& a, int64_t m, const TileOperand& b, int64_t n, float* c,
                          int64_t c_stride) {
  constexpr bool kAdds = kAddsAtEnd<kProducts, kAccumulate>;
  alignas(64) float sums[kAdds ? kM * kN * kTileSide * kTileSide : 1];
  float* const place = kAdds ? sums : c;
  const int64_t stride = kAdds ? kN * kTileSide : c_stride;
  float* const second = place + (kN == 2 ? kTileSide : kTileSide * stride);
  constexpr int kSecond = kN == 2 ? 1 : 2;
  if constexpr (kAccumulate && !kAdds) {
    load_sums<0>(place, stride * 4);
    if constexpr (kM * kN == 2) load_sums<kSecond>(second, stride * 4);
  } else {
    clear_sums<0>();
    if constexpr (kM * kN == 2) clear_sums<kSecond>();
  }
  NothingBeside nothing;
  for (int64_t step = 0; step < steps; ++step)
    multiply_tiles<kProducts, kM, kN>(a, m * kTileSide * a.row_bytes, b, n * 64, step, OpenedBefore(), nothing);
  store_sums<0>(place, stride * 4);
  if constexpr (kM * kN == 2) store_sums<kSecond>(second, stride * 4);
  if constexpr (kAdds) add_stored_sums<kM, kN>(sums, c, c_stride);
}

constexpr bool kCallsBeside = true;

// c = a · b, or c += a · b, for m_tiles × n_tiles (both even) tiles of c and a sum over `steps` tile depths of numbers
// in pieces. The last tiles wait.
template <bool kAccumulate, PieceProducts kProducts, class Beside>
TA_INLINE void tile_product_beside(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b,
                                   float* c, int64_t c_stride, WaitingSums& waiting, Beside& beside) {
  // GCC's tile intrinsics do not tell the compiler that they read and write memory.
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < n_tiles; n += 2) {
    for (int64_t m = 0; m < m_tiles; m += 2) {
      square_block<kProducts, kAccumulate>(steps, a, m, b, n, c + m * kTileSide * c_stride + n * kTileSide, c_stride,
                                           waiting, beside);
    }
  }
  asm volatile("" ::: "memory");
}

// The same with nothing beside it, for any number of tiles.
template <bool kAccumulate, PieceProducts kProducts = kOneProduct>
TA_NOINLINE void tile_product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                              int64_t c_stride, WaitingSums& waiting) {
  NothingBeside nothing;
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < n_tiles; n += 2) {
    const bool two_columns = n + 1 < n_tiles;
    for (int64_t m = 0; m < m_tiles; m += 2) {
      const bool two_rows = m + 1 < m_tiles;
      float* place = c + m * kTileSide * c_stride + n * kTileSide;
      if (two_rows && two_columns) {
        square_block<kProducts, kAccumulate>(steps, a, m, b, n, place, c_stride, waiting, nothing);
        continue;
      }
      waiting.flush();
      if (two_columns) {
        edge_block<kProducts, 1, 2, kAccumulate>(steps, a, m, b, n, place, c_stride);
      } else if (two_rows) {
        edge_block<kProducts, 2, 1, kAccumulate>(steps, a, m, b, n, place, c_stride);
      } else {
        edge_block<kProducts, 1, 1, kAccumulate>(steps, a, m, b, n, place, c_stride);
      }
    }
  }
  asm volatile("" ::: "memory");
}

// The same, with nothing left waiting.
template <bool kAccumulate, PieceProducts kProducts = kOneProduct>
TA_INLINE void tile_product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                            int64_t c_stride) {
  WaitingSums waiting;
  tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, waiting);
  waiting.flush();
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
