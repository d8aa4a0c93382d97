// The backward pass by products of bfloat16: what ../backward_walk.h does, with the products of tiles.h. Weights and
// score gradients are rounded to bfloat16, or split (pieces.h), for the products that read them. Included by kernels.h.
#pragma once

#include "../backward_tasks.h"
#include "band_edges.h"
#include "forward.h"
#include "half_tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Query rows per task: in pieces, as many as leave room for the keys in the L2 cache.
constexpr int64_t kAmxBackwardRows = 512;

// Panels whose tiles are kept for one sum over their rows.
constexpr int64_t kGroupPanels = 8;

// The query side: what ../row_block.h holds, as operands of products. An operand's pieces are all_rows of its rows
// apart.
template <class Stored>
struct AmxRowBlock {
  static constexpr int kPieces = kPiecesOf<Stored>;
  int64_t batch, head, row, rows, lanes, all_rows;
  int64_t head_dim, value_dim;          // padded to whole tile depths
  uint16_t *query, *grad_out;           // B operands for the dots: [lane offset · dim][dim / 2][lane][2]
  uint16_t *query_pairs, *grad_pairs;   // B operands for the sums over rows: [row pair][column][2]
  float *logsumexp, *delta;             // [lane]
  bool infinite = false;                // see operands.h
  const float* weight_scale = nullptr;  // calls with a large logsumexp do not come here

  AmxRowBlock(const AttentionProblem& p, int64_t max_rows, Scratch& scratch)
      : all_rows(max_rows), head_dim(round_up(p.head_dim, kTileDepth)), value_dim(round_up(p.value_dim, kTileDepth)) {
    query = scratch.take<uint16_t>(kPieces * max_rows * head_dim);
    grad_out = scratch.take<uint16_t>(kPieces * max_rows * value_dim);
    query_pairs = scratch.take<uint16_t>(kPieces * max_rows * head_dim);
    grad_pairs = scratch.take<uint16_t>(kPieces * max_rows * value_dim);
    row_memory_ = scratch.take<uint16_t>(kPieces * max_rows * larger(head_dim, value_dim));
    logsumexp = scratch.take<float>(max_rows);
    delta = scratch.take<float>(max_rows);
    grad_memory_ = scratch.take<float>(value_dim);
    out_memory_ = scratch.take<float>(value_dim);
  }

  void read(const AttentionProblem& p, const BackwardTensors& t, int64_t new_batch, int64_t new_head, int64_t first_row,
            int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    lanes = round_up(rows, kAmxLanes);
    pack(p.query, p.head_dim, head_dim, query, query_pairs);
    pack(t.grad_out, p.value_dim, value_dim, grad_out, grad_pairs);
    const auto grad_row = [&](int64_t i) {
      return padded_rows(t.grad_out, batch, head, row + i, 1, p.value_dim, grad_memory_).data;
    };
    load_logsumexp_and_delta(p, t, batch, head, row, rows, lanes, grad_row, out_memory_, logsumexp, delta);
  }

 private:
  void pack(const TensorView& view, int64_t columns, int64_t all_columns, uint16_t* panels, uint16_t* pairs) {
    Source<Stored> in(view, batch, head, row, rows, columns, lanes, all_columns, row_memory_, &infinite);
    const int64_t piece_stride = all_rows * all_columns;
    for (int64_t offset = 0; offset < lanes; offset += kAmxLanes) {
      in.lanes(panels + offset * all_columns, piece_stride, offset, kAmxLanes);
    }
    in.row_pairs(pairs, piece_stride);
  }

  uint16_t* row_memory_;
  float *grad_memory_, *out_memory_;
};

template <class Stored>
struct AmxWalk {
  using Real = float;
  using Block = AmxRowBlock<Stored>;
  static constexpr int kPieces = kPiecesOf<Stored>;
  using Tensors = BackwardTensors;
  using Wanted = GradientTile<float>::Wanted;
  static constexpr int64_t kColumns = kTileSide;
  static constexpr int64_t kExtraKeys = kTileDepth;
  static int64_t block_rows(const AttentionProblem& p) {
    const int64_t most = kPieces * (p.head_dim + p.value_dim) > 512 ? kAmxBackwardRows / 2 : kAmxBackwardRows;
    const int64_t blocks = (p.query_length + most - 1) / most;
    return blocks == 0 ? kAmxLanes : round_up((p.query_length + blocks - 1) / blocks, kAmxLanes);
  }

  const BackwardPlan& plan;
  const AttentionProblem& p;
  const BackwardTensors& t;
  int64_t batch, kv_head;
  int64_t head_dim, value_dim, query_columns;
  float *key_sums, *value_sums;
  TileSession session;
  mutable WaitingSums sums;
  GradientTile<float> tile;
  int64_t key_block_size, panel_size;  // panel_size: of a panel's tile
  HalfTiles half_tiles;                // of a group of panels: [panel][key][lane]
  float *grad_query, *grad_query_rows, *ones;
  uint16_t *key_memory, *value_memory, *key_pairs, *keys_transposed;

  AmxWalk(const AttentionProblem& problem, const BackwardTensors& tensors, const BackwardPlan& backward_plan,
          int64_t batch_index, int64_t kv_head_index, float* key_gradient, float* value_gradient, Scratch& scratch)
      : plan(backward_plan),
        p(problem),
        t(tensors),
        batch(batch_index),
        kv_head(kv_head_index),
        head_dim(round_up(p.head_dim, kTileDepth)),
        value_dim(round_up(p.value_dim, kTileDepth)),
        query_columns(round_up(p.head_dim, kTileSide)),
        key_sums(key_gradient),
        value_sums(value_gradient),
        tile(p, t, scratch) {
    static_assert(kAmxKeys * kAmxLanes <= kBackwardKeys * kMaxVectors * kLanes<float>, "TileScratch is too small");
    key_block_size = amx_key_block<Stored>(p);
    panel_size = key_block_size * kAmxLanes;
    for (Tile& memory : tiles) {
      memory.scores = scratch.take<float>(panel_size);
      memory.gradients = scratch.take<float>(panel_size);
      if (p.dropout_p > 0) memory.words = scratch.take<uint32_t>(dropout_words(key_block_size, kAmxLanes));
    }
    half_tiles.piece_stride = kGroupPanels * panel_size;
    half_tiles.weights = scratch.take<uint16_t>(kPieces * half_tiles.piece_stride);
    half_tiles.gradients = scratch.take<uint16_t>(kPieces * half_tiles.piece_stride);
    half_tiles.pairs = scratch.take<uint16_t>(kPieces * HalfTiles::kPairsPieceStride);
    grad_query = scratch.take<float>(plan.block_rows * query_columns);
    grad_query_rows = scratch.take<float>(kAmxLanes * query_columns);
    ones = scratch.take<float>(kAmxLanes);
    fill<float>(ones, 1, kAmxLanes);
    key_memory = scratch.take<uint16_t>(kPieces * kAmxKeys * head_dim);
    value_memory = scratch.take<uint16_t>(kPieces * kAmxKeys * value_dim);
    key_pairs = scratch.take<uint16_t>(kAmxKeys * head_dim);
    keys_transposed = scratch.take<uint16_t>(kPieces * kAmxKeys * head_dim);
  }

  // A block of keys as A operands.
  struct KeyBlock {
    int64_t key, keys, all_keys;
    TileOperand key_rows, key_columns, value_rows;
  };

  // A panel with a block of keys.
  struct Tile {
    int64_t offset;
    KeySpan span;
    float *scores, *gradients;  // [key][lane]; scores are divided by factor
    uint32_t* words = nullptr;  // of dropout
    KeptTile<float, kAmxVectors> kept;
    float factor;
    HalfTiles half;
    const char* next_mask;  // the element that the next tile's mask starts with
  };
  Tile tiles[2];

  float over_keys(Block& block) {
    if (block.infinite) __atomic_store_n(&plan.infinite, true, __ATOMIC_RELAXED);
    const ScoreStage<float> stage(p, batch, block.head);
    if (plan.needs_query) fill<float>(grad_query, 0, block.lanes * query_columns);
    float slope_gradient = 0;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const int64_t panels = block.lanes / kAmxLanes;
    for (int64_t key = range.begin; key < range.end; key += key_block_size) {
      KeyBlock keys{key, smaller(key_block_size, range.end - key), 0, {}, {}, {}};
      keys.all_keys = round_up(keys.keys, kTileDepth);
      Source<Stored> key_source(p.key, batch, kv_head, key, keys.keys, p.head_dim, keys.all_keys, head_dim, key_memory,
                                &plan.infinite);
      keys.key_rows = key_source.by_rows();
      if (plan.needs_query) keys.key_columns = key_source.by_columns(keys_transposed, key_pairs);
      keys.value_rows = Source<Stored>(p.value, batch, kv_head, key, keys.keys, p.value_dim, keys.all_keys, value_dim,
                                       value_memory, &plan.infinite)
                            .by_rows();
      const NextRows next(p, batch, kv_head, key + keys.keys, key_block_size, range.end - key - keys.keys, panels);
      for (int64_t first = 0; first < panels; first += kGroupPanels) {
        attend(block, stage, first, smaller(kGroupPanels, panels - first), keys, next, slope_gradient);
      }
    }
    if (plan.needs_query) store_grad_query(block);
    return slope_gradient;
  }

  // A group of panels with one block of keys.
  TA_NOINLINE void attend(const Block& block, const ScoreStage<float>& stage, int64_t first, int64_t panels,
                          const KeyBlock& keys, const NextRows& next, float& slope_gradient) {
    KeySpan spans[kGroupPanels];
    Tile *now = &tiles[0], *waiting = nullptr;
    for (int64_t i = 0; i < panels; ++i) {
      now->offset = (first + i) * kAmxLanes;
      const bool last = now->offset + kAmxLanes >= block.lanes;
      const int64_t then = last ? 0 : now->offset + kAmxLanes;  // the next panel
      RowsAhead ahead;
      next.add_share(first + i, ahead);
      const int64_t next_row = block.row + then, next_key = last ? keys.key + keys.keys : keys.key;
      if (!is_attended_shared() && !adds_beside(stage)) {
        add_bias(stage.mask_rows, next_row, smaller(kAmxLanes, block.rows - then), next_key, keys.keys, ahead);
      }
      now->next_mask = adds_beside(stage) ? next_mask_of(stage, next_row, next_key) : nullptr;
      now->half = half_tiles;
      now->half.weights += i * panel_size, now->half.gradients += i * panel_size;
      const bool attends = add_dots(block, *now, waiting, stage, keys, slope_gradient, ahead);
      ahead.ask_for_rest();
      spans[i] = now->span;
      if (!attends) continue;
      waiting = now;
      now = &tiles[now == &tiles[0] ? 1 : 0];
    }
    RowsAhead nothing;
    AskBeside<Stored> ask(nothing);
    if (waiting != nullptr) add_gradients(block, *waiting, stage, keys, slope_gradient, ask);
    if (plan.needs_value) {
      sum_over_rows(block, first, panels, spans, keys, half_tiles.weights, block.grad_pairs, value_dim,
                    plan.value_columns, value_sums);
    }
    if (plan.needs_key) {
      sum_over_rows(block, first, panels, spans, keys, half_tiles.gradients, block.query_pairs, head_dim,
                    plan.key_columns, key_sums);
    }
    sums.flush();
  }

  // Whether nothing but the mask and the band changes scores, so that PlainHalfTiles will do.
  bool is_plain(const ScoreStage<float>& stage) const {
    return plan.needs_scores && !plan.needs_slopes && !stage.softcap;
  }

  // The dots of one panel, and its scores. False if it attends none of the keys; its weights and gradients are 0 then.
  // The panel before, which waits with its dots, is finished meanwhile (see AmxForward::add_scores).
  TA_NOINLINE bool add_dots(const Block& block, Tile& now, const Tile* waiting, const ScoreStage<float>& stage,
                            const KeyBlock& keys, float& slope_gradient, RowsAhead& ahead) {
    const int64_t row = block.row + now.offset, rows = smaller(kAmxLanes, block.rows - now.offset);
    const KeySpan span = now.span = KeySpan::of(stage.band, row, rows, keys.key, keys.all_keys, kTileDepth);
    if (span.empty()) return false;
    BiasTile<float> bias;
    MaskedPanel masked;
    MaskEffect effect = MaskEffect::kNone;
    if (MaskedPanel::serves(stage, rows, span)) {
      const auto* bits =
          plan.attended == nullptr ? nullptr : plan.attended->at(batch, block.head, row, keys.key + span.begin);
      effect = masked.load(stage.mask_rows, bits, row, keys.key, span);
    } else if (!load_bias<float, kAmxVectors>(stage, tile.scratch, row, rows, keys.key, span, bias)) {
      effect = MaskEffect::kExcludesAll;
    }
    if (effect == MaskEffect::kExcludesAll) {
      const int64_t from = span.begin * kAmxLanes, count = (span.end - span.begin) * kAmxLanes;
      for (int piece = 0; piece < kPieces; ++piece) {
        fill<uint16_t>(now.half.weights + piece * now.half.piece_stride + from, 0, count);
        fill<uint16_t>(now.half.gradients + piece * now.half.piece_stride + from, 0, count);
      }
      return false;
    }
    AskBeside<Stored> ask(ahead);
    constexpr int64_t kStages = 2;
    const bool is_masked = effect == MaskEffect::kSome;
    const bool is_beside = is_masked && (adds_beside(stage) || stage.mask_rows.dtype == ScalarType::kBool);
    ahead.divide(kStages + (waiting == nullptr || is_beside ? 0 : query_portions(*waiting)) +
                 (is_masked && !is_beside ? masked.squares(span) : 0));
    ask.ask();
    if (is_plain(stage))
      now.kept = kept_tile<float, kAmxVectors>(p, tile.dropout, batch, block.head, row, keys.key, span, now.words);
    if (waiting != nullptr && is_plain(stage)) {
      const auto multiply = [&]<int kParts>() TA_INLINE_LAMBDA {
        (this->*(p.dropout_p > 0 ? &AmxWalk::multiply_beside<true, kParts> : &AmxWalk::multiply_beside<false, kParts>))(
            block, now, *waiting, stage, keys);
      };
      // A block of 32 keys has 16 parts.
      if (head_dim + value_dim <= 128) {
        multiply.template operator()<4>();
      } else if (head_dim + value_dim <= 256) {
        multiply.template operator()<2>();
      } else {
        multiply.template operator()<1>();
      }
      if (!is_beside) add_grad_query(*waiting, keys, ask);
    } else {
      if (waiting != nullptr) add_gradients(block, *waiting, stage, keys, slope_gradient, ask);
      NothingBeside nothing;
      multiply(block, now, keys, nothing);
      sums.flush();
    }
    now.factor = stage.dot_factor();
    ask.ask();
    if (is_masked) {
      const bool query_waits = waiting != nullptr && is_plain(stage) && is_beside;
      if (query_waits) sums.flush();
      now.factor = masked.apply<false>(
          span, now.factor, now.scores, nullptr, query_columns, now.next_mask, tile.scratch.staging,
          [&](auto& parts) TA_INLINE_LAMBDA {
            if (query_waits) add_grad_query(*waiting, keys, ProductBeside{parts});
          },
          [&] { ask.ask(); });
    } else if (has_plain_edges(stage, bias, span, now.factor)) {
      exclude_outside(stage.band, span, row, keys.key, now.scores);
    } else if (stage.changes_elements(bias) || span.has_edges()) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, keys.key, span.begin, span.end, now.factor,
                                        now.scores, tile.scratch.derivative, nullptr);
      now.factor = 1;
    }
    return true;
  }

  // scores[key][lane] = key · query, gradients[key][lane] = value · grad_out.
  template <class Beside>
  TA_INLINE void multiply(const Block& block, const Tile& now, const KeyBlock& keys, Beside& beside) const {
    const struct {
      const TileOperand& rows;
      const uint16_t* panels;
      int64_t dim;
      float* out;
    } products[] = {{keys.key_rows, block.query, head_dim, now.scores},
                    {keys.value_rows, block.grad_out, value_dim, now.gradients}};
    // A loop, so that the code of what is done beside them is there once.
    const int count = plan.needs_scores ? 2 : 1;
    for (int i = 0; i < count; ++i) {
      const auto& [rows, panels, dim, out] = products[i];
      const TileOperand panel{panels + now.offset * dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                              block.all_rows * dim * 2};
      tile_product_beside<false, kDots<Stored>>((now.span.end - now.span.begin) / kTileSide, kAmxVectors,
                                                dim / kTileDepth, rows.from_row(now.span.begin), panel,
                                                out + now.span.begin * kAmxLanes, kAmxLanes, sums, beside);
    }
  }
  template <bool kDropout, int kParts>
  TA_NOINLINE void multiply_beside(const Block& block, const Tile& now, const Tile& waiting,
                                   const ScoreStage<float>& stage, const KeyBlock& keys) const {
    auto halves = halves_of<kDropout, kParts>(block, waiting, stage);
    multiply(block, now, keys, halves);
    halves.finish();
  }

  template <bool kDropout, int kParts>
  TA_INLINE PlainHalfTiles<Stored, kDropout, kParts> halves_of(const Block& block, const Tile& from,
                                                               const ScoreStage<float>& stage) const {
    return {from.span,
            from.factor,
            from.scores,
            from.gradients,
            block.logsumexp + from.offset,
            block.delta + from.offset,
            stage.mod.scale,
            from.kept,
            from.half};
  }

  // Finishes a panel that waits.
  TA_NOINLINE void add_gradients(const Block& block, const Tile& from, const ScoreStage<float>& stage,
                                 const KeyBlock& keys, float& slope_gradient, AskBeside<Stored>& ask) {
    if (is_plain(stage)) {
      p.dropout_p > 0 ? halves_of<true, 0>(block, from, stage).finish()
                      : halves_of<false, 0>(block, from, stage).finish();
    } else {
      tile.finish<kAmxVectors>(block, stage, from.offset, keys.key, from.span, from.factor,
                               plan.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly, from.scores,
                               from.gradients, plan.needs_slopes ? &slope_gradient : nullptr);
      halve_tiles<Stored>(from.span.begin, from.span.end, from.scores, from.gradients, from.half);
    }
    add_grad_query(from, keys, ask);
  }

  int64_t query_portions(const Tile& from) const {
    if (!plan.needs_query) return 0;
    return AskBeside<Stored>::portions(query_columns / kTileSide, kAmxVectors,
                                       (from.span.end - from.span.begin) / kTileDepth);
  }
  // A floating mask is added beside a product of numbers in pieces: bfloat16's leaves so little time that a pass of its
  // own is faster, by 3 % with a mask per head in bfloat16 and by 8 % in float32.
  bool adds_beside(const ScoreStage<float>& stage) const { return kPieces > 1 && MaskedPanel::asks_ahead(stage); }

  bool is_attended_shared() const { return plan.attended != nullptr && plan.attended->defined(); }

  // Nothing but grad_query's last tiles waits afterwards.
  template <class Product>
  TA_INLINE void add_grad_query(const Tile& from, const KeyBlock& keys, const Product& product) const {
    if (!plan.needs_query) return sums.flush();
    const TileOperand pairs{from.half.pairs, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                            HalfTiles::kPairsPieceStride * 2};
    product.template multiply<true, kSums<Stored>>(
        query_columns / kTileSide, kAmxVectors, (from.span.end - from.span.begin) / kTileDepth,
        keys.key_columns.from_depth(from.span.begin), pairs, grad_query + from.offset * query_columns, kAmxLanes, sums);
  }

  // to[key][column] += Σ_row tiles[key][row] · rows[row][column] over a group of panels, for each 32 keys over those
  // that attend them.
  void sum_over_rows(const Block& block, int64_t first_panel, int64_t panels, const KeySpan* spans,
                     const KeyBlock& keys, const uint16_t* tiles, const uint16_t* row_pairs, int64_t row_columns,
                     int64_t columns, float* to) const {
    for (int64_t key = 0; key < keys.all_keys; key += kTileDepth) {
      int64_t first = 0, last = panels;
      const auto attends = [&](const KeySpan& span) { return span.begin <= key && key < span.end; };
      while (first < last && !attends(spans[first])) ++first;
      while (first < last && !attends(spans[last - 1])) --last;
      if (first == last) continue;
      const TileOperand tile_operand{tiles + first * panel_size + key * kAmxLanes, kAmxLanes * 2, panel_size * 2,
                                     half_tiles.piece_stride * 2};
      const TileOperand row_operand{row_pairs + (first_panel + first) * kAmxLanes * row_columns, row_columns * 4,
                                    kTileDepth / 2 * row_columns * 4, block.all_rows * row_columns * 2};
      tile_product<true, kSums<Stored>>(kTileDepth / kTileSide, columns / kTileSide, last - first, tile_operand,
                                        row_operand, to + (keys.key + key) * columns, columns, sums);
    }
  }

  void store_grad_query(const Block& block) {
    for (int64_t offset = 0; offset < block.lanes; offset += kAmxLanes) {
      store_panel(t.grad_query, batch, block.head, block.row + offset, smaller(kAmxLanes, block.rows - offset),
                  p.head_dim, grad_query + offset * query_columns, kAmxLanes, ones, grad_query_rows);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
