// The backward pass by products of bfloat16: what ../backward_walk.h does, with the products of tiles.h. Weights and
// score gradients are rounded to bfloat16, or split (pieces.h), for the products that read them. Included by kernels.h.
#pragma once

#include "../backward_tasks.h"
#include "forward.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Measured at head_dim 128: 128 and 512 rows are 13 and 6 % slower, blocks of 64 keys 6 %.
constexpr int64_t kAmxBackwardRows = 256;

// The query side: what ../row_block.h holds, as operands of products. An operand's pieces are all_rows of its rows
// apart.
template <class Stored>
struct AmxRowBlock {
  static constexpr int kPieces = kPiecesOf<Stored>;
  int64_t batch, head, row, rows, lanes, all_rows;
  int64_t head_dim, value_dim;  // padded to whole tile depths
  uint16_t *query, *grad_out;   // B operands for the dots: [lane offset · dim][dim / 2][lane][2]
  uint16_t *query_pairs,
      *grad_pairs;           // B operands for the sums over rows, in pairs kLanesApart apart: [row / 2][column][2]
  float *logsumexp, *delta;  // [lane]
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
    const Source<Stored> in(view, batch, head, row, rows, columns, lanes, all_columns, row_memory_);
    const int64_t piece_stride = all_rows * all_columns;
    for (int64_t offset = 0; offset < lanes; offset += kAmxLanes) {
      in.lanes(panels + offset * all_columns, piece_stride, offset, kAmxLanes);
    }
    in.row_pairs(pairs, piece_stride);
  }

  uint16_t* row_memory_;
  float *grad_memory_, *out_memory_;
};

// What the products read of a panel's tile: weights after dropout and score gradients by rows (store_lanes), and the
// gradients also as the pairs of a B operand, which starts at the tile's first key.
struct HalfTiles {
  uint16_t *weights, *gradients;  // [key][lane]
  int64_t piece_stride;
  uint16_t* pairs;

  static constexpr int64_t kPairsPieceStride = kAmxKeys * kAmxLanes;

  // The weights of key j.
  template <class Stored>
  TA_INLINE void store_weights(int64_t j, Vec<float> low, Vec<float> high) const {
    store_lanes<Stored>(weights + j * kAmxLanes, piece_stride, low, high);
  }

  // The gradients, by key and vector, of keys j and j + 1; pairs starts at key begin.
  template <class Stored>
  TA_INLINE void store_gradients(int64_t j, int64_t begin, Vec<float> (&x)[2][2]) const {
    constexpr int n_lanes = kLanes<float>;
    uint16_t *by_rows = gradients + j * kAmxLanes, *by_pairs = pairs + (j - begin) * kAmxLanes;
    if constexpr (kPiecesOf<Stored> == 1) {
      store_halves(by_rows, x[0][0], x[0][1]);
      store_halves(by_rows + kAmxLanes, x[1][0], x[1][1]);
      store_pairs(by_pairs, x[0][0], x[1][0]);
      store_pairs(by_pairs + 2 * n_lanes, x[0][1], x[1][1]);
      return;
    }
#pragma GCC unroll 3
    for (int piece = 0; piece < kPiecesOf<Stored>; ++piece) {
      const Vec<float> a = take_piece(x[0][0]), b = take_piece(x[0][1]), c = take_piece(x[1][0]),
                       d = take_piece(x[1][1]);
      uint16_t *rows = by_rows + piece * piece_stride, *columns = by_pairs + piece * kPairsPieceStride;
      _mm512_storeu_si512(rows, upper_halves(a, b));
      _mm512_storeu_si512(rows + kAmxLanes, upper_halves(c, d));
      _mm512_storeu_si512(columns, upper_halves(a, c));
      _mm512_storeu_si512(columns + 2 * n_lanes, upper_halves(b, d));
    }
  }
};

// The tiles of keys [begin, end), as float, become HalfTiles.
template <class Stored>
TA_NOINLINE void halve_tiles(int64_t begin, int64_t end, const float* weights, const float* gradients,
                             const HalfTiles& to) {
  constexpr int n_lanes = kLanes<float>;
  for (int64_t j = begin; j < end; j += 2) {
    const int64_t even = j * kAmxLanes, odd = even + kAmxLanes;
    to.store_weights<Stored>(j, load(weights + even), load(weights + even + n_lanes));
    to.store_weights<Stored>(j + 1, load(weights + odd), load(weights + odd + n_lanes));
    Vec<float> gradient[2][2] = {{load(gradients + even), load(gradients + even + n_lanes)},
                                 {load(gradients + odd), load(gradients + odd + n_lanes)}};
    to.store_gradients<Stored>(j, begin, gradient);
  }
}

// weights_and_gradients without weight_scale or derivative, and halve_tiles in one pass: nothing else needs the float
// tiles. Dropout's scale costs no instruction: weights get it in their exponents, P · (keep · g − delta) is
// (scale · P) · (g or 0 − delta / scale), and both ways to drop are masks of instructions that are there anyway, but
// where weights are split.
template <class Stored, bool kDropout>
TA_NOINLINE void plain_half_tiles(int64_t begin, int64_t end, float score_factor, const float* scores,
                                  const float* value_dots, const float* logsumexp, const float* delta, float factor,
                                  KeptTile<float> dropout, const HalfTiles& to) {
  constexpr int n_lanes = kLanes<float>;
  const float log_scale = kDropout ? __builtin_logf(dropout.scale) : 0;
  const Vec<float> row_logsumexp[2] = {load(logsumexp) - log_scale, load(logsumexp + n_lanes) - log_scale};
  const Vec<float> row_delta[2] = {load(delta) / dropout.scale, load(delta + n_lanes) / dropout.scale};
  for (int64_t j = begin; j < end; j += 2) {
    Vec<float> weight[2][2], gradient[2][2];  // [key][vector]
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __mmask16 kept[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int64_t place = (j + i) * kAmxLanes + n * n_lanes;
        weight[i][n] = exp_for<Stored>(load(scores + place) * score_factor - row_logsumexp[n]);
        Vec<float> difference = load(value_dots + place) - row_delta[n];
        if constexpr (kDropout) {
          kept[n] = dropout.kept[(j + i) * kAmxVectors + n].lanes;
          difference = _mm512_mask_sub_ps(-row_delta[n], kept[n], load(value_dots + place), row_delta[n]);
        }
        gradient[i][n] = weight[i][n] * difference * factor;
      }
      if constexpr (!kDropout) {
        to.store_weights<Stored>(j + i, weight[i][0], weight[i][1]);
      } else if constexpr (kPiecesOf<Stored> == 1) {
        store_halves(to.weights + (j + i) * kAmxLanes, weight[i][0], weight[i][1], _mm512_kunpackw(kept[1], kept[0]));
      } else {
        to.store_weights<Stored>(j + i, _mm512_maskz_mov_ps(kept[0], weight[i][0]),
                                 _mm512_maskz_mov_ps(kept[1], weight[i][1]));
      }
    }
    to.store_gradients<Stored>(j, begin, gradient);
  }
}

template <class Stored>
struct AmxWalk {
  using Real = float;
  using Block = AmxRowBlock<Stored>;
  static constexpr int kPieces = kPiecesOf<Stored>;
  using Tensors = BackwardTensors;
  using Wanted = GradientTile<float>::Wanted;
  static constexpr int64_t kColumns = kTileSide;
  static constexpr int64_t kExtraKeys = kTileDepth;
  static constexpr int64_t kMaxPanels = kAmxBackwardRows / kAmxLanes;
  static int64_t block_rows(int64_t rows) {
    const int64_t blocks = (rows + kAmxBackwardRows - 1) / kAmxBackwardRows;
    return blocks == 0 ? kAmxLanes : round_up((rows + blocks - 1) / blocks, kAmxLanes);
  }

  const BackwardPlan& plan;
  const AttentionProblem& p;
  const BackwardTensors& t;
  int64_t batch, kv_head;
  int64_t head_dim, value_dim, query_columns;
  float *key_sums, *value_sums;
  TileSession session;
  GradientTile<float> tile;
  float *scores, *gradients;  // one tile: [key][lane]
  HalfTiles half_tiles;       // of all panels: [panel][key][lane]
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
    scores = scratch.take<float>(kAmxKeys * kAmxLanes);
    gradients = scratch.take<float>(kAmxKeys * kAmxLanes);
    half_tiles.piece_stride = plan.block_rows * kAmxKeys;
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

  float over_keys(Block& block) {
    const ScoreStage<float> stage(p, batch, block.head);
    if (plan.needs_query) fill<float>(grad_query, 0, block.lanes * query_columns);
    float slope_gradient = 0;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const int64_t key_block_size = amx_key_block<Stored>(p);
    for (int64_t key = range.begin; key < range.end; key += key_block_size) {
      KeyBlock keys{key, smaller(key_block_size, range.end - key), 0, {}, {}, {}};
      keys.all_keys = round_up(keys.keys, kTileDepth);
      const Source<Stored> key_source(p.key, batch, kv_head, key, keys.keys, p.head_dim, keys.all_keys, head_dim,
                                      key_memory);
      keys.key_rows = key_source.by_rows();
      if (plan.needs_query) keys.key_columns = key_source.by_columns(keys_transposed, key_pairs);
      keys.value_rows =
          Source<Stored>(p.value, batch, kv_head, key, keys.keys, p.value_dim, keys.all_keys, value_dim, value_memory)
              .by_rows();
      const NextRows next(p, batch, kv_head, key + keys.keys, key_block_size, range.end - key - keys.keys,
                          block.lanes / kAmxLanes);
      KeySpan spans[kMaxPanels];
      for (int64_t i = 0; i * kAmxLanes < block.lanes; ++i) {
        RowsAhead ahead;
        next.add_share(i, ahead);
        const int64_t then = (i + 1) * kAmxLanes < block.lanes ? (i + 1) * kAmxLanes : 0;
        add_bias(stage.mask_rows, block.row + then, smaller(kAmxLanes, block.rows - then),
                 then > 0 ? key : key + keys.keys, keys.keys, ahead);
        spans[i] = attend(block, stage, i, keys, slope_gradient, ahead);
        ahead.ask_for_rest();
      }
      if (plan.needs_value) {
        sum_over_rows(block, spans, keys, half_tiles.weights, block.grad_pairs, value_dim, plan.value_columns,
                      value_sums);
      }
      if (plan.needs_key) {
        sum_over_rows(block, spans, keys, half_tiles.gradients, block.query_pairs, head_dim, plan.key_columns,
                      key_sums);
      }
    }
    if (plan.needs_query) store_grad_query(block);
    return slope_gradient;
  }

  // One panel's weights and gradients with one block of keys, and its grad_query. Returns the keys that it filled in.
  TA_NOINLINE KeySpan attend(const Block& block, const ScoreStage<float>& stage, int64_t panel, const KeyBlock& keys,
                             float& slope_gradient, RowsAhead& ahead) {
    const int64_t offset = panel * kAmxLanes, row = block.row + offset, rows = smaller(kAmxLanes, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, keys.key, keys.all_keys, kTileDepth);
    if (span.empty()) return span;
    HalfTiles half = half_tiles;
    half.weights += offset * kAmxKeys, half.gradients += offset * kAmxKeys;
    const int64_t count = span.end - span.begin, first = span.begin * kAmxLanes;
    BiasTile<float> bias;
    MaskedPanel masked;
    MaskEffect effect = MaskEffect::kNone;
    if (MaskedPanel::serves(stage, rows, span)) {
      effect = masked.load(stage.mask_rows, row, keys.key, span);
    } else if (!load_bias<float, kAmxVectors>(stage, tile.scratch, row, rows, keys.key, span, bias)) {
      effect = MaskEffect::kExcludesAll;
    }
    if (effect == MaskEffect::kExcludesAll) {
      for (int piece = 0; piece < kPieces; ++piece) {
        fill<uint16_t>(half.weights + piece * half.piece_stride + first, 0, count * kAmxLanes);
        fill<uint16_t>(half.gradients + piece * half.piece_stride + first, 0, count * kAmxLanes);
      }
      return span;
    }
    const auto kept =
        kept_tile<float, kAmxVectors>(p, tile.dropout, batch, block.head, row, keys.key, span, tile.scratch.kept);
    const auto portions = [&](int64_t dim) {
      return AskBeside<Stored>::portions(count / kTileSide, kAmxVectors, dim / kTileDepth);
    };
    ahead.divide(portions(head_dim) + (plan.needs_scores ? portions(value_dim) : 0));
    AskBeside<Stored> ask(ahead);
    dots(keys.key_rows, block.query, block, offset, head_dim, span, scores, ask);
    float factor = stage.dot_factor();
    if (effect == MaskEffect::kSome) {
      factor = masked.apply<false>(span, factor, scores, nullptr);
    } else if (stage.changes_elements(bias) || span.has_edges()) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, keys.key, span.begin, span.end, factor,
                                        scores, tile.scratch.derivative, nullptr);
      factor = 1;
    }
    if (plan.needs_scores) dots(keys.value_rows, block.grad_out, block, offset, value_dim, span, gradients, ask);
    if (plan.needs_scores && !plan.needs_slopes && !stage.softcap) {
      const auto fill_in = kept.kept != nullptr ? plain_half_tiles<Stored, true> : plain_half_tiles<Stored, false>;
      fill_in(span.begin, span.end, factor, scores, gradients, block.logsumexp + offset, block.delta + offset,
              stage.mod.scale, kept, half);
    } else {
      tile.finish<kAmxVectors>(block, stage, offset, keys.key, span, factor,
                               plan.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly, scores, gradients,
                               plan.needs_slopes ? &slope_gradient : nullptr);
      halve_tiles<Stored>(span.begin, span.end, scores, gradients, half);
    }
    if (plan.needs_query) {
      const TileOperand key_operand = keys.key_columns.from_depth(span.begin);
      const TileOperand gradient_operand{half.pairs, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                         HalfTiles::kPairsPieceStride * 2};
      tile_product<true, kSums<Stored>>(query_columns / kTileSide, kAmxVectors, count / kTileDepth, key_operand,
                                        gradient_operand, grad_query + offset * query_columns, kAmxLanes);
    }
    return span;
  }

  // out[key][lane] = rows[key] · panel[lane] for the keys of span and the panel that starts at lane offset.
  static void dots(const TileOperand& rows, const uint16_t* panels, const Block& block, int64_t offset, int64_t dim,
                   const KeySpan& span, float* out, AskBeside<Stored>& ask) {
    const TileOperand row_operand = rows.from_row(span.begin);
    const TileOperand panel_operand{panels + offset * dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                    block.all_rows * dim * 2};
    ask.template product<false, kDots<Stored>>((span.end - span.begin) / kTileSide, kAmxVectors, dim / kTileDepth,
                                               row_operand, panel_operand, out + span.begin * kAmxLanes, kAmxLanes);
  }

  // sums[key][column] += Σ_row tiles[key][row] · rows[row][column], for each group of keys over the panels that attend
  // it.
  void sum_over_rows(const Block& block, const KeySpan* spans, const KeyBlock& keys, const uint16_t* tiles,
                     const uint16_t* row_pairs, int64_t row_columns, int64_t columns, float* sums) const {
    for (int64_t key = 0; key < keys.all_keys; key += kTileDepth) {
      int64_t first = 0, last = block.lanes / kAmxLanes;
      const auto attends = [&](const KeySpan& span) { return span.begin <= key && key < span.end; };
      while (first < last && !attends(spans[first])) ++first;
      while (first < last && !attends(spans[last - 1])) --last;
      if (first == last) continue;
      const TileOperand tile_operand{tiles + first * kAmxLanes * kAmxKeys + key * kAmxLanes, kAmxLanes * 2,
                                     kAmxLanes * kAmxKeys * 2, half_tiles.piece_stride * 2};
      const TileOperand row_operand{row_pairs + first * kAmxLanes * row_columns, row_columns * 4,
                                    kTileDepth / 2 * row_columns * 4, block.all_rows * row_columns * 2};
      tile_product<true, kSums<Stored>>(kTileDepth / kTileSide, columns / kTileSide, last - first, tile_operand,
                                        row_operand, sums + (keys.key + key) * columns, columns);
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
