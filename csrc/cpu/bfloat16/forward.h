// The forward pass by products of bfloat16: the same walk over the keys as ../forward.h, whose comments apply, with the
// products of tiles.h. Weights are rounded to bfloat16, or split (pieces.h), for the second product; their sum is not.
// Included by kernels.h.
#pragma once

#include "../forward.h"
#include "band_edges.h"
#include "dropout_beside.h"
#include "forward_tiles.h"
#include "masked_scores.h"
#include "operands.h"
#include "product_beside.h"
#include "softmax_pairs.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// With kKeepsWeights, which dropout excludes, a tile's weights, not yet divided by their sum, replace its scores.
template <class Stored, bool kKeepsWeights = false>
struct AmxForward {
  static constexpr int kPieces = kPiecesOf<Stored>;

  const AttentionProblem& p;
  const ForwardOutputs& outputs;
  const AttendedBits& attended;
  bool* infinite;
  Dropout dropout;
  int64_t block_rows, row_blocks;
  int64_t head_dim, value_dim;  // padded to whole tile depths

  // infinite: see operands.h.
  AmxForward(const AttentionProblem& problem, const ForwardOutputs& out, const AttendedBits& attended_bits, int threads,
             bool* infinite_found)
      : p(problem),
        outputs(out),
        attended(attended_bits),
        infinite(infinite_found),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)),
        head_dim(round_up(problem.head_dim, kTileDepth)),
        value_dim(round_up(problem.value_dim, kTileSide)) {
    int64_t most = has_narrow_window(problem) ? kWindowRows : kAmxRows;
    const auto items = [&] { return p.batch * p.heads * ((p.query_length + most - 1) / most); };
    while (most > 2 * kAmxLanes && items() < 4 * threads) most /= 2;
    const int64_t blocks = (p.query_length + most - 1) / most;
    block_rows = round_up((p.query_length + blocks - 1) / blocks, kAmxLanes);
    row_blocks = (p.query_length + block_rows - 1) / block_rows;
  }

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  using Block = ForwardRows;
  using KeyBlock = ForwardKeys;
  using Tile = ForwardTile;

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
    const int64_t packed_values = round_up(p.value_dim, kTileDepth);
    WaitingSums sums;
    block.sums = &sums;
    take_memory(block, scratch);
    Tile tiles[2];
    for (Tile& memory : tiles) {
      memory.scores = scratch.take<float>(kAmxKeys * kAmxLanes);
      memory.words = scratch.take<uint32_t>(p.dropout_p > 0 ? dropout_words(kAmxKeys, kAmxLanes) : 0);
    }
    auto* value_scratch = scratch.take<uint16_t>(kPieces * kAmxKeys * packed_values);
    auto* value_pairs = scratch.take<uint16_t>(kAmxKeys * packed_values);
    const int64_t key_block_size = amx_key_block<Stored>(p);
    const int64_t block_bytes = kPieces * key_block_size * (head_dim + packed_values) * 2;
    const bool reads_mask = stage.mask && !stage.mask_is_per_key() && !attended.defined();
    const bool spans = kPieces < 3 || reads_mask;
    const int64_t most = spans ? larger<int64_t>(1, smaller(kMostKeyBlocks, kSpanBytes / block_bytes)) : 1;
    KeyBlock key_blocks[kMostKeyBlocks];
    for (int64_t i = 0; i < most; ++i) {
      key_blocks[i].key_memory = scratch.take<uint16_t>(kPieces * key_block_size * head_dim);
      key_blocks[i].value_memory = scratch.take<uint16_t>(kPieces * key_block_size * packed_values);
      key_blocks[i].bias_memory = scratch.take<float>(stage.mask_is_per_key() ? key_block_size : 0);
    }

    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const PhiloxPanel philox(dropout, p.dropout_batch_head(block.batch, block.head));
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
                                    block.row + panel * kAmxLanes + rows_of(block, panel));
    };
    const auto start_until = [&](int64_t panel) {
      while (started < panel) start(block, started++);
    };
    if (panels > 0) last_key = keys_of(0).end;
    // So many panels' rows of query and output have been asked for.
    int64_t queries_asked = streams ? 1 : panels, outputs_asked = streams ? 0 : panels;
    const Tile* waiting = nullptr;
    const auto finish_until = [&](int64_t panel, int64_t end) {
      while (finished < smaller(panel, started) && last_key <= end &&
             (waiting == nullptr || waiting->offset > finished * kAmxLanes)) {
        finish(block, finished++);
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
      const RowShares outs = rows_of_panels(outputs.out, p.value_dim, block, outputs_asked, ending, tiles_of.total);
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
        if (reads_mask && !adds_beside(stage)) {
          add_bias(stage.mask_rows, next_row, smaller(kAmxLanes, block.rows - then), next_key, key_block_size, ahead);
        }
        now->next_mask = adds_beside(stage) ? next_mask_of(stage, next_row, next_key) : nullptr;
        if (add_scores(block, *now, waiting, stage, ahead)) {
          waiting = now;
          now = &tiles[now == &tiles[0] ? 1 : 0];
        }
        ahead.ask_for_rest();
        if (streams) finish_until(panel, end);
      }
      if (waiting != nullptr) add_values(block, *waiting);
      waiting = nullptr;
      if (streams) finish_until(panels, end);
    }
    start_until(panels);
    finish_until(panels, larger(range.end, stage.band.key_length));
  }

  void take_memory(Block& block, Scratch& scratch) const {
    constexpr int64_t tile = kAmxKeys * kAmxLanes;
    const bool masked = p.attn_mask.defined();
    block.query = scratch.take<uint16_t>(kPieces * block.lanes * head_dim);
    block.has_output = scratch.take<bool>(block.lanes / kAmxLanes);
    block.out = scratch.take<float>(block.lanes * value_dim);
    for (float** array : {&block.maximum, &block.old_maximum, &block.sum, &block.rescale}) {
      *array = scratch.take<float>(block.lanes);
    }
    block.bias = scratch.take<float>(masked ? tile : 0);
    block.staging = scratch.take<float>(masked ? tile : 0);
    block.weights = scratch.take<uint16_t>(kPieces * tile);
    block.query_rows = scratch.take<uint16_t>(kPieces * kAmxLanes * head_dim);
    block.out_rows = scratch.take<float>(kAmxLanes * value_dim);
  }

  int64_t rows_of(const Block& block, int64_t panel) const {
    return smaller(kAmxLanes, block.rows - panel * kAmxLanes);
  }
  RowShares rows_of_panels(const TensorView& view, int64_t columns, const Block& block, int64_t first, int64_t last,
                           int64_t shares) const {
    const int64_t begin = first * kAmxLanes, end = smaller(last * kAmxLanes, block.rows);
    return RowShares::of(view, block.batch, block.head, block.row + begin, end - begin, columns, shares);
  }

  void start(const Block& block, int64_t panel) const {
    const int64_t offset = panel * kAmxLanes, rows = rows_of(block, panel);
    Source<Stored>(p.query, block.batch, block.head, block.row + offset, rows, p.head_dim, rows, head_dim,
                   block.query_rows, infinite)
        .lanes(block.query + offset * head_dim, block.lanes * head_dim, 0, kAmxLanes);
    const float lowest = -__builtin_inff();
    float sink = lowest;
    if (p.sinks.defined()) sink = head_number<float>(p.sinks, block.batch, block.head);
    fill<float>(block.maximum + offset, sink, kAmxLanes);
    fill<float>(block.sum + offset, sink == lowest ? 0 : 1, kAmxLanes);
    block.has_output[panel] = false;
  }

  // The scores of one panel, up to its new maximum; false if it attends none of the keys. The panel before, which waits
  // with its scores, is finished meanwhile: products alone leave the vector units idle, and exponentials the tiles.
  // beside, if any, is done beside its product with the values, where there is a place for it.
  template <class Beside = NothingBeside>
  TA_NOINLINE bool add_scores(const Block& block, Tile& tile, const Tile* waiting, const ScoreStage<float>& stage,
                              RowsAhead& ahead, Beside* beside = nullptr) const {
    const KeyBlock& keys = *tile.keys;
    const int64_t row = block.row + tile.offset, rows = smaller(kAmxLanes, block.rows - tile.offset);
    const KeySpan span = tile.span = KeySpan::of(stage.band, row, rows, keys.key, keys.all_keys, kTileDepth);
    if (span.empty()) return false;
    BiasTile<float> bias = keys.bias;
    MaskedPanel masked;
    MaskEffect effect = MaskEffect::kNone;
    if (MaskedPanel::serves(stage, rows, span)) {
      effect = masked.load(stage.mask_rows, attended.at(block.batch, block.head, row, keys.key + span.begin), row,
                           keys.key, span);
      if (effect == MaskEffect::kExcludesAll) return false;
    } else if (stage.mask && !stage.mask_is_per_key() &&
               !load_bias_per_lane(stage.mask_rows, row, rows, kAmxLanes, keys.key, span.begin, span.end, block.staging,
                                   block.bias, bias)) {
      return false;
    }
    AskBeside<Stored> ask(ahead);
    constexpr int64_t kStages = 3;
    const bool is_masked = effect == MaskEffect::kSome;
    const bool is_beside = is_masked && (adds_beside(stage) || stage.mask_rows.dtype == ScalarType::kBool);
    ahead.divide(kStages + (waiting == nullptr || is_beside ? 0 : value_portions(*waiting)) +
                 (is_masked && !is_beside ? masked.squares(span) : 0));
    ask.ask();
    const auto multiply = [&]<int kParts>() TA_INLINE_LAMBDA {
      if constexpr (!kKeepsWeights) {
        if (p.dropout_p > 0) return multiply_keys<true, kParts>(block, tile, waiting);
      }
      multiply_keys<false, kParts>(block, tile, waiting);
    };
    // A block of 32 keys has 32 parts.
    if (head_dim <= 64) {
      multiply.template operator()<16>();
    } else if (head_dim <= 128) {
      multiply.template operator()<8>();
    } else {
      multiply.template operator()<4>();
    }
    ask.ask();
    const auto multiply_waiting = [&](const auto& product) TA_INLINE_LAMBDA {
      if (waiting != nullptr) multiply_values(block, *waiting, product);
    };
    if (p.dropout_p > 0) {
      drop(block, tile, is_beside ? nullptr : waiting, ask);
    } else if (!is_beside) {
      if constexpr (std::is_same_v<Beside, NothingBeside>) {
        multiply_waiting(ask);
      } else {
        multiply_waiting(ProductBeside{*beside});
      }
    }
    if (waiting == nullptr || is_beside) block.sums->flush();  // else values' product has stored the last scores

    float *maximum = block.maximum + tile.offset, *old_maximum = block.old_maximum + tile.offset;
    __builtin_memcpy(old_maximum, maximum, kAmxLanes * sizeof(float));
    tile.factor = stage.dot_factor();
    if (is_masked) {
      tile.factor = masked.apply<true>(
          span, tile.factor, tile.scores, maximum, value_dim, tile.next_mask, block.staging,
          [&](auto& parts) TA_INLINE_LAMBDA {
            if (is_beside) multiply_waiting(ProductBeside{parts});
          },
          [&] { ask.ask(); });
    } else if (has_plain_edges(stage, bias, span, tile.factor)) {
      exclude_outside(stage.band, span, row, keys.key, tile.scores);
      raise_maximum(span.begin, span.end, tile.factor, tile.scores, maximum);
    } else if (stage.changes_elements(bias) || span.has_edges() || !(tile.factor > 0)) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, keys.key, span.begin, span.end, tile.factor,
                                        tile.scores, nullptr, maximum);
      tile.factor = 1;
    } else {
      raise_maximum(span.begin, span.end, tile.factor, tile.scores, maximum);
    }
    tile.rescaled = settle_maximum(old_maximum, maximum, block.rescale + tile.offset);
    ask.ask();
    return true;
  }

  // bfloat16's products of long rows leave no time for a floating mask: a pass of its own is up to 3 % faster there.
  bool adds_beside(const ScoreStage<float>& stage) const {
    return MaskedPanel::asks_ahead(stage) && (kPieces > 1 || value_dim <= 64);
  }

  // The dots of a panel, and beside them the weights of the panel that waits, kParts of SoftmaxPairs in each step.
  template <bool kDropout, int kParts>
  TA_NOINLINE void multiply_keys(const Block& block, const Tile& tile, const Tile* waiting) const {
    const KeyBlock& keys = *tile.keys;
    const int64_t begin = tile.span.begin, count = tile.span.end - begin;
    const int64_t m_tiles = count / kTileSide, steps = head_dim / kTileDepth;
    const TileOperand key_operand = keys.key_rows.from_row(begin);
    const TileOperand query_operand{block.query + tile.offset * head_dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                    block.lanes * head_dim * 2};
    float* scores = tile.scores + begin * kAmxLanes;
    SoftmaxPairs<Stored, kDropout, kParts, kKeepsWeights> softmax;
    if (waiting != nullptr) softmax = softmax_of<kDropout, kParts>(block, *waiting);
    tile_product_beside<false, kDots<Stored>>(m_tiles, kAmxVectors, steps, key_operand, query_operand, scores,
                                              kAmxLanes, *block.sums, softmax);
    if (waiting != nullptr) softmax.finish(block.rescale + waiting->offset, block.sum + waiting->offset);
  }

  template <bool kDropout, int kParts>
  TA_INLINE SoftmaxPairs<Stored, kDropout, kParts, kKeepsWeights> softmax_of(const Block& block,
                                                                             const Tile& tile) const {
    return {tile.span.begin, tile.span.end, tile.factor, tile.scores, tile.words, block.maximum + tile.offset,
            block.weights};
  }

  // Finishes a panel that waits.
  TA_NOINLINE void add_values(const Block& block, const Tile& tile) const {
    block.sums->flush();
    const auto weigh = [&]<bool kDropout>() TA_INLINE_LAMBDA {
      softmax_of<kDropout, 0>(block, tile).finish(block.rescale + tile.offset, block.sum + tile.offset);
    };
    p.dropout_p > 0 ? weigh.template operator()<true>() : weigh.template operator()<false>();
    RowsAhead nothing;
    AskBeside<Stored> ask(nothing);
    multiply_values(block, tile, ask);
    block.sums->flush();
  }

  int64_t value_portions(const Tile& tile) const {
    return AskBeside<Stored>::portions(value_dim / kTileSide, kAmxVectors,
                                       (tile.span.end - tile.span.begin) / kTileDepth);
  }

  // What dropout drops of a tile, beside the values of the panel that waits, if any. Beside the dots, where
  // exponentials are, it costs 16 to 21 % of a plain pass at head_dim 64, as much as in a pass of its own; here 13 % in
  // bfloat16 and nothing in float32 and float16.
  void drop(const Block& block, const Tile& tile, const Tile* waiting, AskBeside<Stored>& ask) const {
    // A block of 32 keys has 8 parts.
    if (value_dim <= 64) return drop_beside_values<4>(block, tile, waiting, ask);
    if (value_dim <= 128) return drop_beside_values<2>(block, tile, waiting, ask);
    drop_beside_values<1>(block, tile, waiting, ask);
  }
  template <int kParts>
  TA_NOINLINE void drop_beside_values(const Block& block, const Tile& tile, const Tile* waiting,
                                      AskBeside<Stored>& ask) const {
    DropoutBeside<kParts> parts(*block.philox, tile.keys->groups, block.row + tile.offset,
                                tile.span.begin / Dropout::kKeysPerCall,
                                (tile.span.end - tile.span.begin) / Dropout::kKeysPerCall, tile.words);
    if (waiting != nullptr) {
      if constexpr (kPieces == 1) {
        BothBeside both{ask, parts};
        multiply_values(block, *waiting, ProductBeside{both});
      } else {
        ask.ask();
        multiply_values(block, *waiting, ProductBeside{parts});
      }
    }
    parts.finish();
  }

  // Adds a panel's weighted values to its output.
  template <class Product>
  TA_INLINE void multiply_values(const Block& block, const Tile& tile, const Product& product) const {
    float* out = block.out + tile.offset * value_dim;
    const float* rescale = block.rescale + tile.offset;
    bool& has_output = block.has_output[tile.offset / kAmxLanes];
    if (tile.rescaled && has_output) {
      for (int64_t i = 0; i < value_dim * kAmxLanes; i += kLanes<float>) {
        store(out + i, load(out + i) * load(rescale + i % kAmxLanes));
      }
    }
    const TileOperand value_operand = tile.keys->value_columns.from_depth(tile.span.begin);
    const TileOperand weight_operand{block.weights, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                     kAmxKeys * kAmxLanes * 2};
    const int64_t tiles = value_dim / kTileSide, steps = (tile.span.end - tile.span.begin) / kTileDepth;
    if (!has_output) {
      has_output = true;
      if constexpr (Product::kMayOverwrite) {
        product.template multiply<false, kSums<Stored>>(tiles, kAmxVectors, steps, value_operand, weight_operand, out,
                                                        kAmxLanes, *block.sums);
        return;
      }
      fill<float>(out, 0, kAmxLanes * value_dim);
    }
    product.template multiply<true, kSums<Stored>>(tiles, kAmxVectors, steps, value_operand, weight_operand, out,
                                                   kAmxLanes, *block.sums);
  }

  void finish(const Block& block, int64_t panel) const {
    using Softmax = OnlineSoftmax<VectorMath<float>>;
    const float keep_scale = p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
    block.sums->flush();
    const int64_t offset = panel * kAmxLanes, rows = rows_of(block, panel), row = block.row + offset;
    float *maximum = block.maximum + offset, *sums = block.sum + offset;
    if (!block.has_output[panel]) fill<float>(block.out + offset * value_dim, 0, kAmxLanes * value_dim);
    for (int64_t i = 0; i < kAmxLanes; i += kLanes<float>) {
      const Vec<float> sum = load(sums + i);
      store(maximum + i, Softmax::logsumexp(load(maximum + i), sum));
      store(sums + i, Softmax::inverse_sum(sum) * keep_scale);
    }
    float* logsumexp = static_cast<float*>(outputs.logsumexp) + p.first_row(block.batch, block.head) + row;
    __builtin_memcpy(logsumexp, maximum, rows * sizeof(float));
    store_panel(outputs.out, block.batch, block.head, row, rows, p.value_dim, block.out + offset * value_dim, kAmxLanes,
                sums, block.out_rows);
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
