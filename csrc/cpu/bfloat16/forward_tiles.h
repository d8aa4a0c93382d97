// How the forward pass by products of bfloat16 is cut up: into blocks of rows, blocks of keys, and tiles of a panel of
// rows with a block of keys. Included by forward_stages.h and walk.h.
#pragma once

#include "../dropout_tile.h"
#include "../mask_tile.h"
#include "../score_tile.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kAmxRows = 1024;

// With a window, fewer tasks pack the same keys (1 to 2 % faster than 1024 rows): few of their rows are in use at a
// time.
constexpr int64_t kWindowRows = 4096;
TA_INLINE bool has_narrow_window(const AttentionProblem& p) { return p.window_left + p.window_right < 2 * kAmxRows; }

// A panel walks over so many bytes of keys and values before the next one does. A mask's rows are then read in pieces
// long enough for memory: with one block of keys at a time, masks cost 1.4 (float) to 3 times (boolean, 8192 keys) as
// much. Twice as many bytes gain 3 % more there, and lose 1 % without a mask at head_dim 128. Without a mask it is up
// to 5 % faster in bfloat16, and 1 % slower in float32, whose keys and values are three pieces each.
constexpr int64_t kSpanBytes = 256 * 1024;

// Keys per block. Measured on an Intel Xeon with AMX: 64 is 5 to 10 % faster than 128 at head_dim 64, whose tiles then
// stay in the L1 cache, and 10 % slower at 128, where each block's addition to the output weighs more.
template <class Stored>
TA_INLINE int64_t amx_key_block(const AttentionProblem& p) {
  return kPiecesOf<Stored> == 1 && larger(p.head_dim, p.value_dim) > 64 ? kAmxKeys : kAmxKeys / 2;
}

constexpr int64_t kMostKeyBlocks = 16;

// A block of rows: one task's.
struct ForwardRows {
  int64_t batch, head, row, rows, lanes;
  uint16_t* query;                               // B operands: [lane offset · head_dim][head_dim / 2][lane][2]
  float* out;                                    // [lane offset · value_dim][value_dim][lane]
  float *maximum, *old_maximum, *sum, *rescale;  // [lane]
  float *bias, *staging;                         // one tile: [key][lane]
  bool* has_output;                              // [panel]: out is 0, and not written, before its first weights
  const PhiloxPanel* philox;
  uint16_t* weights;     // a B operand
  uint16_t* query_rows;  // of a panel, on their way
  float* out_rows;
  WaitingSums* sums;
};

// A block of keys as A operands: keys by rows, values transposed.
struct ForwardKeys {
  int64_t key, keys, all_keys;  // all_keys: with padding
  TileOperand key_rows, value_columns;
  BiasTile<float> bias;        // of a mask that has one number for each key
  PhiloxPanel::Groups groups;  // with dropout
  uint16_t *key_memory, *value_memory;
  float* bias_memory;
};
// A panel's scores with a block of keys.
struct ForwardTile {
  int64_t offset;
  const ForwardKeys* keys;
  KeySpan span;
  float* scores;    // [key][lane], divided by factor
  uint32_t* words;  // of dropout, from span.begin on
  float factor;
  uint32_t rescaled;      // see settle_maximum
  const char* next_mask;  // the element that the next tile's mask starts with
};

// The tiles of a block of rows and some blocks of keys, without those that the band excludes: panel by panel, from
// the first to the last and then anew.
struct BandTiles {
  const BandMask& band;
  const ForwardRows& block;
  const ForwardKeys* key_blocks;
  int64_t panels, count, first, total = 0;
  int64_t panel, key_block = 0, end_block = 0;  // key_block: of the panel's, up to end_block
  bool whole;                                   // whether the band excludes none

  BandTiles(const BandMask& mask, const ForwardRows& rows, const ForwardKeys* blocks, int64_t block_count,
            int64_t first_panel)
      : band(mask),
        block(rows),
        key_blocks(blocks),
        panels(rows.lanes / kAmxLanes),
        count(block_count),
        first(first_panel),
        panel(first_panel) {
    const KeyRange all = band.keys_of_all(block.row, block.row + block.rows);
    const ForwardKeys& last = blocks[larger<int64_t>(count, 1) - 1];
    whole = count > 0 && all.begin <= blocks[0].key && last.key + last.keys <= all.end;
    for (panel = panels - 1; panel >= first_panel; --panel) {
      cut();
      total += end_block - key_block;
      if (end_block > key_block) first = panel;
    }
    panel = first;
    if (total > 0) cut();
  }

  void advance() {
    if (++key_block < end_block) return;
    do {
      panel = panel + 1 < panels ? panel + 1 : first;
      cut();
    } while (end_block <= key_block && panel != first);
  }

  // Which blocks of keys the panel attends.
  void cut() {
    key_block = 0, end_block = count;
    if (whole) return;
    const int64_t row = block.row + panel * kAmxLanes, end = smaller(row + kAmxLanes, block.row + block.rows);
    const KeyRange keys = band.keys_of_any(row, end);
    while (key_block < end_block && key_blocks[key_block].key + key_blocks[key_block].keys <= keys.begin) ++key_block;
    while (key_block < end_block && key_blocks[end_block - 1].key >= keys.end) --end_block;
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
