// The two products of ../decode.h for bfloat16 on AMX's tiles, whose time hardly depends on the number of rows up to
// 16: one key/value block is multiplied with the rows of all heads that read it at once. Included by kernels.h.
#pragma once

#include "../decode.h"
#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

struct DecodeTiles {
  using Real = float;
  static constexpr int64_t kRowGranule = kTileSide;
  static constexpr int64_t kColumnGranule = kTileDepth;

  // With fewer rows to a key/value head, tiles would be mostly empty: the vectors of ../decode.h read memory faster
  // then.
  static bool suits(int64_t query_length, int64_t group) {
    return query_length * group > kFewRowsOfDecode &&
           (query_length < kTileSide || (query_length == kTileSide && group > 1));
  }

  const AttentionProblem& p;
  int64_t batch, kv_head, rows, all_rows, head_dim, value_dim;
  TileSession session;
  uint16_t* query;    // B operands: [row / 16][head_dim / 2][row % 16][2]
  float* transposed;  // scores: [key][row]
  uint16_t *key_scratch, *value_scratch, *value_pairs;
  uint16_t* weights;  // an A operand: [row][key]

  DecodeTiles(const AttentionProblem& problem, int64_t batch_index, int64_t head_index, int64_t row_count,
              Scratch& scratch)
      : p(problem),
        batch(batch_index),
        kv_head(head_index),
        rows(row_count),
        all_rows(round_up(rows, kTileSide)),
        head_dim(round_up(p.head_dim, kTileDepth)),
        value_dim(round_up(p.value_dim, kTileDepth)) {
    query = scratch.take<uint16_t>(all_rows * head_dim);
    transposed = scratch.take<float>(all_rows * kDecodeKeys);
    key_scratch = scratch.take<uint16_t>(kDecodeKeys * head_dim);
    value_scratch = scratch.take<uint16_t>(kDecodeKeys * value_dim);
    value_pairs = scratch.take<uint16_t>(kDecodeKeys * value_dim);
    weights = scratch.take<uint16_t>(all_rows * kDecodeKeys);
    fill<uint16_t>(weights, 0, all_rows * kDecodeKeys);
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

  // Tiles are read column by column, which the hardware does not foresee: the keys are first copied, row by row.
  void dots(int64_t key, int64_t keys, float* scores, LinesAhead& ahead) {
    const int64_t all_keys = round_up(keys, kTileSide);
    ahead.divide(all_rows / kTileSide * (all_keys / kTileSide));
    copy_half_rows(key_scratch, p.key, batch, kv_head, key, keys, p.head_dim, all_keys, head_dim);
    const TileOperand key_operand{key_scratch, head_dim * 2, kTileDepth * 2};
    for (int64_t row = 0; row < rows; row += kTileSide) {
      const TileOperand query_operand{query + row * head_dim, kTileSide * 4, kTileDepth / 2 * kTileSide * 4};
      tile_product<false>(all_keys / kTileSide, 1, head_dim / kTileDepth, key_operand, query_operand, transposed,
                          kTileSide);
      for (int64_t j = 0; j < all_keys; j += kTileSide) {
        ahead.ask();
        Vec<float> square[16];
        load_transposed_words(square, reinterpret_cast<const char*>(transposed + j * kTileSide), kTileSide * 4);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(scores + (row + i) * kDecodeKeys + j, square[i]);
      }
    }
  }

  void combine(int64_t key, int64_t keys, const float* float_weights, const float* rescale, float* out,
               int64_t out_stride, LinesAhead& ahead) {
    const int64_t all_keys = round_up(keys, kTileDepth);
    ahead.divide(rows);
    const HalfRows value_rows =
        half_rows(p.value, batch, kv_head, key, keys, p.value_dim, all_keys, value_dim, value_scratch);
    pair_rows(value_pairs, value_rows, all_keys, value_dim);
    for (int64_t row = 0; row < rows; ++row) {
      ahead.ask();
      for (int64_t j = 0; j < all_keys; j += kTileDepth) {
        const float* place = float_weights + row * kDecodeKeys + j;
        store_halves(weights + row * kDecodeKeys + j, load(place),
                     j + kLanes<float> < keys ? load(place + kLanes<float>) : Vec<float>{});
      }
      if (rescale[row] == 1) continue;
      float* sums = out + row * out_stride;
      for (int64_t i = 0; i < value_dim; i += kLanes<float>) store(sums + i, load(sums + i) * rescale[row]);
    }
    const TileOperand weight_operand{weights, kDecodeKeys * 2, kTileDepth * 2};
    const TileOperand value_operand{value_pairs, value_dim * 4, kTileDepth / 2 * value_dim * 4};
    tile_product<true>(all_rows / kTileSide, value_dim / kTileSide, all_keys / kTileDepth, weight_operand,
                       value_operand, out, out_stride);
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
