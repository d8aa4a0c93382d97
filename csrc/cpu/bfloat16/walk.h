// The backward pass for bfloat16: what ../backward_walk.h does, with the products of tiles.h. Weights and score
// gradients are rounded to bfloat16 for the products that read them. Included by kernels.h.
#pragma once

#include "../backward_tasks.h"
#include "forward.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Measured at head_dim 128: 128 and 512 rows are 13 and 6 % slower, blocks of 64 keys 6 %.
constexpr int64_t kAmxBackwardRows = 256;

// The query side: what ../row_block.h holds, in bfloat16.
struct AmxRowBlock {
  int64_t batch, head, row, rows, lanes;
  int64_t head_dim, value_dim;          // padded to whole tile depths
  uint16_t *query, *grad_out;           // B operands for the dots: [lane offset · dim][dim / 2][lane][2]
  uint16_t *query_pairs, *grad_pairs;   // B operands for the sums over rows: [row / 2][column][2]
  float *logsumexp, *delta;             // [lane]
  const float* weight_scale = nullptr;  // calls with a large logsumexp do not come here

  AmxRowBlock(const AttentionProblem& p, int64_t max_rows, Scratch& scratch)
      : head_dim(round_up(p.head_dim, kTileDepth)), value_dim(round_up(p.value_dim, kTileDepth)) {
    query = scratch.take<uint16_t>(max_rows * head_dim);
    grad_out = scratch.take<uint16_t>(max_rows * value_dim);
    query_pairs = scratch.take<uint16_t>(max_rows * head_dim);
    grad_pairs = scratch.take<uint16_t>(max_rows * value_dim);
    row_memory_ = scratch.take<uint16_t>(max_rows * larger(head_dim, value_dim));
    logsumexp = scratch.take<float>(max_rows);
    delta = scratch.take<float>(max_rows);
    grad_memory_ = scratch.take<float>(value_dim);
    out_memory_ = scratch.take<float>(value_dim);
    fill<float>(grad_memory_, 0, value_dim);
  }

  void read(const AttentionProblem& p, const BackwardTensors& t, int64_t new_batch, int64_t new_head, int64_t first_row,
            int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    lanes = round_up(rows, kAmxLanes);
    pack(p.query, p.head_dim, head_dim, query, query_pairs);
    pack(t.grad_out, p.value_dim, value_dim, grad_out, grad_pairs);
    const auto grad_row = [&](int64_t i) {
      load_row(grad_memory_, t.grad_out.dtype, element(t.grad_out, batch, head, row + i), 1, p.value_dim);
      return grad_memory_;
    };
    load_logsumexp_and_delta(p, t, batch, head, row, rows, lanes, grad_row, out_memory_, logsumexp, delta);
  }

 private:
  void pack(const TensorView& view, int64_t columns, int64_t all_columns, uint16_t* panels, uint16_t* pairs) {
    const HalfRows in = half_rows(view, batch, head, row, rows, columns, lanes, all_columns, row_memory_);
    for (int64_t offset = 0; offset < lanes; offset += kAmxLanes) {
      pack_pairs(panels + offset * all_columns, kAmxLanes, {in.data + offset * in.stride, in.stride}, kAmxLanes,
                 all_columns);
    }
    pair_rows(pairs, in, lanes, all_columns);
  }

  uint16_t* row_memory_;
  float *grad_memory_, *out_memory_;
};

// The weights after dropout and the score gradients of keys [begin, end), as float, become A operands (by rows), and
// the gradients also a B operand, whose pairs start at key begin.
TA_NOINLINE void halve_tiles(int64_t begin, int64_t end, const float* weights, const float* gradients,
                             uint16_t* half_weights, uint16_t* half_gradients, uint16_t* gradient_pairs) {
  constexpr int n_lanes = kLanes<float>;
  for (int64_t j = begin; j < end; j += 2) {
    const int64_t even = j * kAmxLanes, odd = even + kAmxLanes;
    store_halves(half_weights + even, load(weights + even), load(weights + even + n_lanes));
    store_halves(half_weights + odd, load(weights + odd), load(weights + odd + n_lanes));
    const Vec<float> a = load(gradients + even), b = load(gradients + even + n_lanes);
    const Vec<float> c = load(gradients + odd), d = load(gradients + odd + n_lanes);
    store_halves(half_gradients + even, a, b);
    store_halves(half_gradients + odd, c, d);
    uint16_t* pairs = gradient_pairs + (j - begin) * kAmxLanes;
    store_pairs(pairs, a, c);
    store_pairs(pairs + 2 * n_lanes, b, d);
  }
}

// weights_and_gradients without weight_scale or derivative, and halve_tiles in one pass: nothing else needs the float
// tiles. Dropout's scale costs no instruction: weights get it in their exponents, P · (keep · g − delta) is
// (scale · P) · (g or 0 − delta / scale), and both ways to drop are masks of instructions that are there anyway.
template <bool kDropout>
TA_NOINLINE void plain_half_tiles(int64_t begin, int64_t end, float score_factor, const float* scores,
                                  const float* value_dots, const float* logsumexp, const float* delta, float factor,
                                  KeptTile<float> dropout, uint16_t* half_weights, uint16_t* half_gradients,
                                  uint16_t* gradient_pairs) {
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
        weight[i][n] = exp_for_half(load(scores + place) * score_factor - row_logsumexp[n]);
        Vec<float> difference = load(value_dots + place) - row_delta[n];
        if constexpr (kDropout) {
          kept[n] = dropout.kept[(j + i) * kAmxVectors + n].lanes;
          difference = _mm512_mask_sub_ps(-row_delta[n], kept[n], load(value_dots + place), row_delta[n]);
        }
        gradient[i][n] = weight[i][n] * difference * factor;
      }
      uint16_t* const to = half_weights + (j + i) * kAmxLanes;
      if constexpr (kDropout) {
        store_halves(to, weight[i][0], weight[i][1], _mm512_kunpackw(kept[1], kept[0]));
      } else {
        store_halves(to, weight[i][0], weight[i][1]);
      }
      store_halves(half_gradients + (j + i) * kAmxLanes, gradient[i][0], gradient[i][1]);
    }
    uint16_t* pairs = gradient_pairs + (j - begin) * kAmxLanes;
    store_pairs(pairs, gradient[0][0], gradient[1][0]);
    store_pairs(pairs + 2 * n_lanes, gradient[0][1], gradient[1][1]);
  }
}

struct AmxWalk {
  using Real = float;
  using Block = AmxRowBlock;
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
  float *scores, *gradients;                // one tile: [key][lane]
  uint16_t *half_weights, *half_gradients;  // A operands: [panel][key][lane]
  uint16_t* gradient_pairs;                 // a B operand
  float *grad_query, *grad_query_rows, *ones;
  uint16_t *key_scratch, *value_scratch, *key_pairs, *keys_transposed;

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
    half_weights = scratch.take<uint16_t>(plan.block_rows * kAmxKeys);
    half_gradients = scratch.take<uint16_t>(plan.block_rows * kAmxKeys);
    gradient_pairs = scratch.take<uint16_t>(kAmxKeys * kAmxLanes);
    grad_query = scratch.take<float>(plan.block_rows * query_columns);
    grad_query_rows = scratch.take<float>(kAmxLanes * query_columns);
    ones = scratch.take<float>(kAmxLanes);
    fill<float>(ones, 1, kAmxLanes);
    key_scratch = scratch.take<uint16_t>(kAmxKeys * head_dim);
    value_scratch = scratch.take<uint16_t>(kAmxKeys * value_dim);
    key_pairs = scratch.take<uint16_t>(kAmxKeys * head_dim);
    keys_transposed = scratch.take<uint16_t>(kAmxKeys * head_dim);
  }

  // A block of keys as A operands.
  struct KeyBlock {
    int64_t key, keys, all_keys;
    HalfRows key_rows, value_rows;
  };

  float over_keys(AmxRowBlock& block) {
    const ScoreStage<float> stage(p, batch, block.head);
    if (plan.needs_query) fill<float>(grad_query, 0, block.lanes * query_columns);
    float slope_gradient = 0;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const int64_t key_block_size = amx_key_block(p);
    for (int64_t key = range.begin; key < range.end; key += key_block_size) {
      KeyBlock keys{key, smaller(key_block_size, range.end - key), 0, {}, {}};
      keys.all_keys = round_up(keys.keys, kTileDepth);
      keys.key_rows =
          half_rows(p.key, batch, kv_head, key, keys.keys, p.head_dim, keys.all_keys, head_dim, key_scratch);
      keys.value_rows =
          half_rows(p.value, batch, kv_head, key, keys.keys, p.value_dim, keys.all_keys, value_dim, value_scratch);
      if (plan.needs_query) transpose_rows(keys_transposed, keys.key_rows, keys.all_keys, head_dim, key_pairs);
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
        sum_over_rows(block, spans, keys, half_weights, block.grad_pairs, value_dim, plan.value_columns, value_sums);
      }
      if (plan.needs_key) {
        sum_over_rows(block, spans, keys, half_gradients, block.query_pairs, head_dim, plan.key_columns, key_sums);
      }
    }
    if (plan.needs_query) store_grad_query(block);
    return slope_gradient;
  }

  // One panel's weights and gradients with one block of keys, and its grad_query. Returns the keys that it filled in.
  TA_NOINLINE KeySpan attend(const AmxRowBlock& block, const ScoreStage<float>& stage, int64_t panel,
                             const KeyBlock& keys, float& slope_gradient, RowsAhead& ahead) {
    const int64_t offset = panel * kAmxLanes, row = block.row + offset, rows = smaller(kAmxLanes, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, keys.key, keys.all_keys, kTileDepth);
    if (span.empty()) return span;
    uint16_t *panel_weights = half_weights + offset * kAmxKeys, *panel_gradients = half_gradients + offset * kAmxKeys;
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
      fill<uint16_t>(panel_weights + first, 0, count * kAmxLanes);
      fill<uint16_t>(panel_gradients + first, 0, count * kAmxLanes);
      return span;
    }
    const int64_t m_tiles = count / kTileSide;
    ahead.divide(AskBeside::calls(m_tiles, kAmxVectors, head_dim / kTileDepth) +
                 (plan.needs_scores ? AskBeside::calls(m_tiles, kAmxVectors, value_dim / kTileDepth) : 0));
    AskBeside ask{ahead};
    const auto kept =
        kept_tile<float, kAmxVectors>(p, tile.dropout, batch, block.head, row, keys.key, span, tile.scratch.kept);
    dots(keys.key_rows, block.query + offset * head_dim, head_dim, span, scores, ask);
    float factor = stage.dot_factor();
    if (effect == MaskEffect::kSome) {
      factor = masked.apply<false>(span, factor, scores, nullptr);
    } else if (stage.changes_elements(bias) || span.has_edges()) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, keys.key, span.begin, span.end, factor,
                                        scores, tile.scratch.derivative, nullptr);
      factor = 1;
    }
    if (plan.needs_scores) dots(keys.value_rows, block.grad_out + offset * value_dim, value_dim, span, gradients, ask);
    if (plan.needs_scores && !plan.needs_slopes && !stage.softcap) {
      (kept.kept != nullptr ? plain_half_tiles<true>
                            : plain_half_tiles<false>)(span.begin, span.end, factor, scores, gradients,
                                                       block.logsumexp + offset, block.delta + offset, stage.mod.scale,
                                                       kept, panel_weights, panel_gradients, gradient_pairs);
    } else {
      tile.finish<kAmxVectors>(block, stage, offset, keys.key, span, factor,
                               plan.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly, scores, gradients,
                               plan.needs_slopes ? &slope_gradient : nullptr);
      halve_tiles(span.begin, span.end, scores, gradients, panel_weights, panel_gradients, gradient_pairs);
    }
    if (plan.needs_query) {
      const TileOperand key_operand{keys_transposed + span.begin, keys.all_keys * 2, kTileDepth * 2};
      const TileOperand gradient_operand{gradient_pairs, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4};
      tile_product<true>(query_columns / kTileSide, kAmxVectors, count / kTileDepth, key_operand, gradient_operand,
                         grad_query + offset * query_columns, kAmxLanes);
    }
    return span;
  }

  // out[key][lane] = rows[key] · panel[lane] for the keys of span.
  static void dots(HalfRows rows, const uint16_t* panel, int64_t dim, const KeySpan& span, float* out, AskBeside& ask) {
    const TileOperand row_operand{rows.data + span.begin * rows.stride, rows.stride * 2, kTileDepth * 2};
    const TileOperand panel_operand{panel, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4};
    tile_product_beside<false>((span.end - span.begin) / kTileSide, kAmxVectors, dim / kTileDepth, row_operand,
                               panel_operand, out + span.begin * kAmxLanes, kAmxLanes, ask);
  }

  // sums[key][column] += Σ_row tiles[key][row] · rows[row][column], for each group of keys over the panels that attend
  // it.
  void sum_over_rows(const AmxRowBlock& block, const KeySpan* spans, const KeyBlock& keys, const uint16_t* tiles,
                     const uint16_t* row_pairs, int64_t row_columns, int64_t columns, float* sums) const {
    for (int64_t key = 0; key < keys.all_keys; key += kTileDepth) {
      int64_t first = 0, last = block.lanes / kAmxLanes;
      const auto attends = [&](const KeySpan& span) { return span.begin <= key && key < span.end; };
      while (first < last && !attends(spans[first])) ++first;
      while (first < last && !attends(spans[last - 1])) --last;
      if (first == last) continue;
      const TileOperand tile_operand{tiles + first * kAmxLanes * kAmxKeys + key * kAmxLanes, kAmxLanes * 2,
                                     kAmxLanes * kAmxKeys * 2};
      const TileOperand row_operand{row_pairs + first * kAmxLanes * row_columns, row_columns * 4,
                                    kTileDepth / 2 * row_columns * 4};
      tile_product<true>(kTileDepth / kTileSide, columns / kTileSide, last - first, tile_operand, row_operand,
                         sums + (keys.key + key) * columns, columns);
    }
  }

  void store_grad_query(const AmxRowBlock& block) {
    for (int64_t offset = 0; offset < block.lanes; offset += kAmxLanes) {
      store_panel(t.grad_query, batch, block.head, block.row + offset, smaller(kAmxLanes, block.rows - offset),
                  p.head_dim, grad_query + offset * query_columns, kAmxLanes, ones, grad_query_rows);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
