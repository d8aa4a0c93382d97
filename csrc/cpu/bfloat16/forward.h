// The forward pass by products of bfloat16: tasks of rows, which walk over the keys like ../forward.h, by the stages of
// forward_stages.h. Included by kernels.h.
#pragma once

#include "forward_stages.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Stored>
struct AmxForward {
  using Block = ForwardRows;
  using KeyBlock = ForwardKeys;
  using Tile = ForwardTile;
  static constexpr int kPieces = kPiecesOf<Stored>;

  const AttentionProblem& p;
  ForwardStages<Stored> stages;
  int64_t block_rows, row_blocks;

  AmxForward(const AttentionProblem& problem, const ForwardOutputs& outputs, const AttendedBits& attended, int threads,
             bool* infinite)
      : p(problem), stages(problem, outputs, attended, infinite) {
    int64_t most = has_narrow_window(problem) ? kWindowRows : kAmxRows;
    const auto items = [&] { return p.batch * p.heads * ((p.query_length + most - 1) / most); };
    while (most > 2 * kAmxLanes && items() < 4 * threads) most /= 2;
    const int64_t blocks = (p.query_length + most - 1) / most;
    block_rows = round_up((p.query_length + blocks - 1) / blocks, kAmxLanes);
    row_blocks = (p.query_length + block_rows - 1) / block_rows;
  }

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  void run(int64_t item, Scratch& scratch) const {
    const TileSession session;
    Block block;
    block.batch = item / (p.heads * row_blocks);
    block.head = item / row_blocks % p.heads;
    block.row = (row_blocks - 1 - item % row_blocks) * block_rows;
    block.rows = smaller(block_rows, p.query_length - block.row);
    block.lanes = round_up(block.rows, kAmxLanes);
    const ScoreStage<float> stage(p, block.batch, block.head);
    const int64_t kv_head = block.head / (p.heads / p.kv_heads);
    const int64_t head_dim = stages.head_dim, packed_values = round_up(p.value_dim, kTileDepth);
    bool* const infinite = stages.infinite;
    WaitingSums sums;
    block.sums = &sums;
    stages.take_memory(block, scratch);
    Tile tiles[2];
    for (Tile& memory : tiles) {
      memory.scores = scratch.take<float>(kAmxKeys * kAmxLanes);
      memory.words = scratch.take<uint32_t>(p.dropout_p > 0 ? dropout_words(kAmxKeys, kAmxLanes) : 0);
    }
    auto* value_scratch = scratch.take<uint16_t>(kPieces * kAmxKeys * packed_values);
    auto* value_pairs = scratch.take<uint16_t>(kAmxKeys * packed_values);
    const int64_t key_block_size = amx_key_block<Stored>(p);
    const int64_t block_bytes = kPieces * key_block_size * (head_dim + packed_values) * 2;
    const bool reads_mask = stage.mask && !stage.mask_is_per_key() && !stages.attended.defined();
    const bool spans = kPieces < 3 || reads_mask;
    const int64_t most = spans ? larger<int64_t>(1, smaller(kMostKeyBlocks, kSpanBytes / block_bytes)) : 1;
    KeyBlock key_blocks[kMostKeyBlocks];
    for (int64_t i = 0; i < most; ++i) {
      key_blocks[i].key_memory = scratch.take<uint16_t>(kPieces * key_block_size * head_dim);
      key_blocks[i].value_memory = scratch.take<uint16_t>(kPieces * key_block_size * packed_values);
      key_blocks[i].bias_memory = scratch.take<float>(stage.mask_is_per_key() ? key_block_size : 0);
    }

    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const PhiloxPanel philox(Dropout::make(p.dropout_p, p.philox_seed, p.philox_offset),
                             p.dropout_batch_head(block.batch, block.head));
    block.philox = &philox;
    // Groups of keys that share random bits are not torn.
    const int64_t first_key = p.dropout_p > 0 ? round_down(range.begin, Dropout::kKeysPerCall) : range.begin;
    const int64_t panels = block.lanes / kAmxLanes, span_keys = most * key_block_size;
    // With a window, a panel is read when its first keys come, and written after its last, both beside the products of
    // others: rows are many for the keys that each attends. The band lets panels start and end in their order. Without
    // one this would cost float32 1 to 3 %.
    const bool streams = has_narrow_window(p);
    int64_t started = 0, finished = 0, last_key = 0;  // of the first that is not finished
    const auto keys_of = [&](int64_t panel) {
      return stage.band.keys_of_any(block.row + panel * kAmxLanes,
                                    block.row + panel * kAmxLanes + stages.rows_of(block, panel));
    };
    const auto start_until = [&](int64_t panel) {
      while (started < panel) stages.start(block, started++);
    };
    if (panels > 0) last_key = keys_of(0).end;
    // So many panels' rows of query and output have been asked for.
    int64_t queries_asked = streams ? 1 : panels, outputs_asked = streams ? 0 : panels;
    const Tile* waiting = nullptr;
    const auto finish_until = [&](int64_t panel, int64_t end) {
      while (finished < smaller(panel, started) && last_key <= end &&
             (waiting == nullptr || waiting->offset > finished * kAmxLanes)) {
        stages.finish(block, finished++);
        if (finished < panels) last_key = keys_of(finished).end;
      }
    };
    if (!streams) start_until(panels);
    for (int64_t begin = first_key; begin < range.end; begin += span_keys) {
      const int64_t end = smaller(begin + span_keys, range.end);
      int64_t count = 0;
      for (int64_t key = begin; key < end; key += key_block_size) {
        KeyBlock& keys = key_blocks[count];
        keys.key = key, keys.keys = smaller(key_block_size, end - key);
        keys.all_keys = round_up(keys.keys, kTileDepth);
        keys.bias = {};
        if (stage.mask_is_per_key() &&
            !load_bias_per_key(stage.mask_rows, key, keys.keys, keys.bias_memory, keys.bias)) {
          continue;
        }
        keys.key_rows = Source<Stored>(p.key, block.batch, kv_head, key, keys.keys, p.head_dim, keys.all_keys, head_dim,
                                       keys.key_memory, infinite)
                            .by_rows();
        keys.value_columns = Source<Stored>(p.value, block.batch, kv_head, key, keys.keys, p.value_dim, keys.all_keys,
                                            packed_values, value_scratch, infinite)
                                 .by_columns(keys.value_memory, value_pairs);
        if (p.dropout_p > 0) {
          philox.groups(key / Dropout::kKeysPerCall, keys.all_keys / Dropout::kKeysPerCall, keys.groups);
        }
        ++count;
      }
      BandTiles tiles_of(stage.band, block, key_blocks, count, finished);
      const NextRows next(p, block.batch, kv_head, end, span_keys, range.end - end, tiles_of.total);
      // Rows of panels that start or end with the next keys; in the first keys, these' too.
      int64_t starting = queries_asked, ending = outputs_asked;
      while (starting < panels && keys_of(starting).begin < end + span_keys) ++starting;
      while (ending < panels && keys_of(ending).end <= end + span_keys) ++ending;
      const RowShares queries = rows_of_panels(p.query, p.head_dim, block, queries_asked, starting, tiles_of.total);
      const RowShares outs =
          rows_of_panels(stages.outputs.out, p.value_dim, block, outputs_asked, ending, tiles_of.total);
      queries_asked = starting, outputs_asked = ending;
      Tile* now = &tiles[0];
      for (int64_t i = 0; i < tiles_of.total; ++i) {
        const int64_t panel = tiles_of.panel;
        now->offset = panel * kAmxLanes;
        now->keys = &key_blocks[tiles_of.key_block];
        tiles_of.advance();
        start_until(panel + 1);
        RowsAhead ahead;
        next.add_share(i, ahead);
        queries.add_share(i, ahead);
        outs.add_share(i, ahead);
        const int64_t then = tiles_of.panel * kAmxLanes, next_row = block.row + then;
        const int64_t next_key = i + 1 < tiles_of.total ? key_blocks[tiles_of.key_block].key : end;
        if (reads_mask && !stages.adds_beside(stage)) {
          add_bias(stage.mask_rows, next_row, smaller(kAmxLanes, block.rows - then), next_key, key_block_size, ahead);
        }
        now->next_mask = stages.adds_beside(stage) ? next_mask_of(stage, next_row, next_key) : nullptr;
        if (stages.add_scores(block, *now, waiting, stage, ahead)) {
          waiting = now;
          now = &tiles[now == &tiles[0] ? 1 : 0];
        }
        ahead.ask_for_rest();
        if (streams) finish_until(panel, end);
      }
      if (waiting != nullptr) stages.add_values(block, *waiting);
      waiting = nullptr;
      if (streams) finish_until(panels, end);
    }
    start_until(panels);
    finish_until(panels, larger(range.end, stage.band.key_length));
  }

  RowShares rows_of_panels(const TensorView& view, int64_t columns, const Block& block, int64_t first, int64_t last,
                           int64_t shares) const {
    const int64_t begin = first * kAmxLanes, end = smaller(last * kAmxLanes, block.rows);
    return RowShares::of(view, block.batch, block.head, block.row + begin, end - begin, columns, shares);
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
