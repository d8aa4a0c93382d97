// What the forward pass by products of bfloat16 does with a panel of rows: the stages are those of ../forward.h, whose
// comments apply, with the products of tiles.h. Weights are rounded to bfloat16, or split (pieces.h), for the second
// product; their sum is not. Included by forward.h and joint_weights.h, which walk over the panels and keys.
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
struct ForwardStages {
  using Block = ForwardRows;
  using KeyBlock = ForwardKeys;
  using Tile = ForwardTile;
  static constexpr int kPieces = kPiecesOf<Stored>;

  const AttentionProblem& p;
  const ForwardOutputs& outputs;
  const AttendedBits& attended;
  bool* infinite;
  int64_t head_dim, value_dim;  // padded to whole tile depths

  // infinite: see operands.h.
  ForwardStages(const AttentionProblem& problem, const ForwardOutputs& out, const AttendedBits& attended_bits,
                bool* infinite_found)
      : p(problem),
        outputs(out),
        attended(attended_bits),
        infinite(infinite_found),
        head_dim(round_up(problem.head_dim, kTileDepth)),
        value_dim(round_up(problem.value_dim, kTileSide)) {}

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
    tile.rescaled = settle_maximum<Stored>(old_maximum, maximum, block.rescale + tile.offset);
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
    if (tile.rescaled != 0 && has_output) rescale_output(tile.rescaled, rescale, value_dim, out);
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
