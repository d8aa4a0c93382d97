// The two products of ../decode.h for bfloat16 on AMX's tiles, whose time hardly depends on the number of rows up to
// 16: one key/value block is multiplied with the rows of all heads that read it at once. Included by kernels.h.
//
// Keys are loaded into tiles as they lie: a copy, row by row, halves the speed, since a tile cannot be loaded while
// stores to it, or to an address that agrees in its last 12 bits, wait for memory.
#pragma once

#include "../decode.h"
#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

struct DecodeTiles {
  using Real = float;
  static constexpr int64_t kKeys = 256;
  static constexpr int64_t kRowGranule = kTileSide;
  static constexpr int64_t kColumnGranule = 64;
  static constexpr int64_t kGroup = 64;  // keys, or columns of values, whose sums are in tiles at once
  // What the next products read is asked for beside the softmax, too, whose time grows with the rows.
  static constexpr bool kAsksBesideSoftmax = true;
  static constexpr bool kWeighs = false;

  // With fewer rows vectors read faster. A panel of forward.h has 32 rows.
  static bool suits(int64_t query_length, int64_t group) {
    return query_length * group > kFewRows && query_length <= kTileSide;
  }
  static constexpr int64_t kFewRows = 2;

  const AttentionProblem& p;
  int64_t batch, kv_head, rows, all_rows, head_dim, value_dim;
  TileSession session;
  uint16_t* query;    // B operands: [row / 16][head_dim / 2][row % 16][2]
  float* sums;        // of a group: [key][row % 16], or [row][column]
  uint16_t* weights;  // A operands: [row][kKeys]
  uint16_t* pairs;    // a B operand: [key / 2][column][2] of kTileDepth keys and a group of columns
  uint16_t* padded;   // a block of keys or values that cannot be read in place

  DecodeTiles(const AttentionProblem& problem, int64_t batch_index, int64_t head_index, int64_t row_count,
              Scratch& scratch)
      : p(problem),
        batch(batch_index),
        kv_head(head_index),
        rows(row_count),
        all_rows(round_up(rows, kTileSide)),
        head_dim(round_up(p.head_dim, kTileDepth)),
        value_dim(round_up(p.value_dim, kColumnGranule)) {
    query = scratch.take<uint16_t>(all_rows * head_dim);
    sums = scratch.take<float>(all_rows * kGroup);
    weights = scratch.take<uint16_t>(all_rows * kKeys);
    pairs = scratch.take<uint16_t>(kTileDepth * kGroup);
    padded = scratch.take<uint16_t>(kKeys * larger(head_dim, value_dim));
    fill<uint16_t>(weights, 0, all_rows * kKeys);
    auto* query_rows = scratch.take<uint16_t>(all_rows * head_dim);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = kv_head * (p.heads / p.kv_heads) + row / p.query_length;
      copy_half_rows(query_rows + row * head_dim, p.query, batch, head, row % p.query_length, 1, p.head_dim, 1,
                     head_dim);
    }
    for (int64_t row = 0; row < rows; row += kTileSide) {
      pack_pairs(query + row * head_dim, kTileSide, {query_rows + row * head_dim, head_dim}, rows - row, head_dim);
    }
  }

  void dots(int64_t key, int64_t keys, float* scores, LinesAhead& lines) {
    LinesAhead ahead = lines;  // in registers
    const int64_t all_keys = round_up(keys, kGroup), steps = head_dim / kTileDepth;
    // Two thirds of the lines; the others beside the softmax.
    ahead.divide(all_rows / kTileSide * (all_keys / kGroup) * steps * 6);
    const HalfRows in = half_rows(p.key, batch, kv_head, key, keys, p.head_dim, all_keys, head_dim, padded);
    const int64_t bytes = in.stride * 2;
    for (int64_t j = 0; j < all_keys; j += kGroup) {
      for (int64_t row = 0; row < all_rows; row += kTileSide) {
        asm volatile("" ::: "memory");  // GCC's tile intrinsics do not tell that they read and write memory
        zero_sums();
        for (int64_t step = 0; step < steps; ++step) {
          const auto tile = [&](int i) TA_INLINE_LAMBDA {
            ahead.ask();
            return in.data + (j + i * kTileSide) * in.stride + step * kTileDepth;
          };
          _tile_loadd(4, query + row * head_dim + step * kTileDepth * kTileSide, kTileSide * 4);
          _tile_loadd(5, tile(0), bytes);
          _tile_dpbf16ps(0, 5, 4);
          _tile_loadd(6, tile(1), bytes);
          _tile_dpbf16ps(1, 6, 4);
          _tile_loadd(7, tile(2), bytes);
          _tile_dpbf16ps(2, 7, 4);
          _tile_loadd(5, tile(3), bytes);
          _tile_dpbf16ps(3, 5, 4);
        }
        store_sums(sums, kTileSide, kTileSide * kTileSide);
        asm volatile("" ::: "memory");
        for (int64_t i = 0; i < kGroup; i += kTileSide) {
          Vec<float> square[16];
          load_transposed_words(square, reinterpret_cast<const char*>(sums + i * kTileSide), kTileSide * 4);
#pragma GCC unroll 16
          for (int r = 0; r < 16; ++r) store(scores + (row + r) * kKeys + j + i, square[r]);
        }
      }
    }
    lines = ahead;
  }

  void combine(int64_t key, int64_t keys, const float* float_weights, const float* rescale, float* out,
               int64_t out_stride, LinesAhead& lines) {
    LinesAhead ahead = lines;
    const int64_t all_keys = round_up(keys, kTileDepth);
    ahead.divide(all_keys / 2 * (value_dim / kGroup));
    const HalfRows in = half_rows(p.value, batch, kv_head, key, keys, p.value_dim, all_keys, value_dim, padded);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < all_keys; j += kTileDepth) {
        const float* place = float_weights + row * kKeys + j;
        store_halves(weights + row * kKeys + j, load(place),
                     j + kLanes<float> < keys ? load(place + kLanes<float>) : Vec<float>{});
      }
    }
    const bool one_tile = all_rows == kTileSide;  // of rows: its sums stay in their registers
    for (int64_t column = 0; column < value_dim; column += kGroup) {
      for (int64_t j = 0; j < all_keys; j += kTileDepth) {
        for (int64_t i = 0; i < kTileDepth; i += 2) {
          ahead.ask();
          const uint16_t* even = in.data + (j + i) * in.stride + column;
          interleave_rows(pairs + i * kGroup, even, even + in.stride);
        }
        asm volatile("" ::: "memory");
        for (int64_t row = 0; row < all_rows; row += kTileSide) {
          float* tile_sums = sums + row * kGroup;
          if (j == 0) {
            zero_sums();
          } else if (!one_tile) {
            load_sums(tile_sums, kGroup, kTileSide);
          }
          constexpr int64_t kPairBytes = kGroup * 4;
          _tile_loadd(4, weights + row * kKeys + j, kKeys * 2);
          _tile_loadd(5, pairs, kPairBytes);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(6, pairs + kTileDepth, kPairBytes);
          _tile_dpbf16ps(1, 4, 6);
          _tile_loadd(7, pairs + 2 * kTileDepth, kPairBytes);
          _tile_dpbf16ps(2, 4, 7);
          _tile_loadd(5, pairs + 3 * kTileDepth, kPairBytes);
          _tile_dpbf16ps(3, 4, 5);
          if (!one_tile || j + kTileDepth == all_keys) store_sums(tile_sums, kGroup, kTileSide);
        }
        asm volatile("" ::: "memory");
      }
      for (int64_t row = 0; row < rows; ++row)
        add_sums(sums + row * kGroup, rescale[row], out + row * out_stride + column);
    }
    lines = ahead;
  }

  // Two rows of values as pairs, interleaved within quarters of a vector, the only way that takes no index: of 32
  // columns, the first tile gets columns 0 to 3 of every 8, the second the others.
  static TA_INLINE void interleave_rows(uint16_t* to, const uint16_t* even, const uint16_t* odd) {
#pragma GCC unroll 2
    for (int64_t c = 0; c < kGroup; c += kTileDepth) {
      const __m512i a = _mm512_loadu_si512(even + c), b = _mm512_loadu_si512(odd + c);
      _mm512_storeu_si512(to + 2 * c, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(to + 2 * c + kTileDepth, _mm512_unpackhi_epi16(a, b));
    }
  }

  // out = out · rescale + sums for kGroup columns, which sums has in the order of interleave_rows.
  static TA_INLINE void add_sums(const float* sums, float rescale, float* out) {
    constexpr int n = kLanes<float>;
    IntVec<float> first{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) first[i] = (i / 8) * 4 + i % 4 + (i / 4 % 2) * n;
#pragma GCC unroll 2
    for (int64_t c = 0; c < kGroup; c += 2 * n) {
      const Vec<float> low = load(sums + c), high = load(sums + c + n);
      store(out + c, load(out + c) * rescale + __builtin_shuffle(low, high, first));
      store(out + c + n, load(out + c + n) * rescale + __builtin_shuffle(low, high, first + n / 2));
    }
  }

  static TA_INLINE void load_sums(const float* from, int64_t stride, int64_t apart) {
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + apart, stride * 4);
    _tile_loadd(2, from + 2 * apart, stride * 4);
    _tile_loadd(3, from + 3 * apart, stride * 4);
  }
  static TA_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static TA_INLINE void store_sums(float* to, int64_t stride, int64_t apart) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + apart, stride * 4);
    _tile_stored(2, to + 2 * apart, stride * 4);
    _tile_stored(3, to + 3 * apart, stride * 4);
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
