// The forward pass by products of bfloat16: the same walk over the keys as ../forward.h, whose comments apply, with the
// products of tiles.h. Weights are rounded to bfloat16, or split (pieces.h), for the second product; their sum is not.
// Included by kernels.h.
#pragma once

#include "../forward.h"
#include "dropout_pairs.h"
#include "masked_scores.h"
#include "operands.h"
#include "softmax_pairs.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kAmxRows = 1024;

// A panel walks over so many bytes of keys and values before the next one does. A mask's rows are then read in pieces
// long enough for memory: with one block of keys at a time, masks cost 1.4 (float) to 3 times (boolean, 8192 keys) as
// much. Twice as many bytes gain 3 % more there, and lose 1 % without a mask at head_dim 128. Without a mask it is up
// to 5 % faster in bfloat16, and 1 % slower in float32, whose keys and values are three pieces each.
constexpr int64_t kSpanBytes = 256 * 1024;

// Asks for rows between the stages of a tile and beside its products: in larger portions rows would wait for each
// other, and the products after them. Products of numbers in pieces take so long that they ask once; beside each,
// float32 would be 3 % slower.
template <class Stored>
class AskBeside {
 public:
  TA_INLINE AskBeside(RowsAhead& ahead) : ahead_(ahead) {}

  template <bool kAccumulate, PieceProducts kProducts>
  TA_NOINLINE void multiply(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                            int64_t c_stride) const {
    if (portions(m_tiles, n_tiles, steps) > 1) {
      tile_product_beside<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, *this);
    } else {
      ask();
      tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride);
    }
  }
  // How many portions a product asks for.
  static TA_INLINE int64_t portions(int64_t m_tiles, int64_t n_tiles, int64_t steps) {
    const bool beside = kCallsBeside && kPiecesOf<Stored> == 1 && m_tiles % 2 == 0 && n_tiles % 2 == 0;
    return beside ? m_tiles / 2 * (n_tiles / 2) * steps : 1;
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() const {
    if constexpr (kSlot == kSlots - 1) ask();
  }
  TA_NOINLINE void ask() const { ahead_.ask_for_portion(); }

 private:
  RowsAhead& ahead_;
};

// A product with something else beside it, as far as there is a place for it.
template <class Parts>
struct ProductBeside {
  Parts& parts;

  template <bool kAccumulate, PieceProducts kProducts>
  TA_INLINE void multiply(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                          int64_t c_stride) const {
    if (m_tiles % 2 == 0 && n_tiles % 2 == 0) {
      tile_product_beside<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, parts);
    } else {
      tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride);
    }
  }
};

// Where the mask of a tile starts that begins with a row and a key; null if it is not read there, or none is.
TA_INLINE const char* next_mask_of(const ScoreStage<float>& stage, int64_t row, int64_t key) {
  const MaskRows& mask = stage.mask_rows;
  const bool is_read = mask.data != nullptr && mask.row_stride != 0 && mask.column_stride == 1 && key < mask.keys;
  return is_read ? mask.at(row, key) : nullptr;
}

// Keys per block. Measured on an Intel Xeon with AMX: 64 is 5 to 10 % faster than 128 at head_dim 64, whose tiles then
// stay in the L1 cache, and 10 % slower at 128, where each block's addition to the output weighs more.
template <class Stored>
TA_INLINE int64_t amx_key_block(const AttentionProblem& p) {
  return kPiecesOf<Stored> == 1 && larger(p.head_dim, p.value_dim) > 64 ? kAmxKeys : kAmxKeys / 2;
}

template <class Stored>
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
    int64_t most = kAmxRows;
    const auto items = [&] { return p.batch * p.heads * ((p.query_length + most - 1) / most); };
    while (most > 2 * kAmxLanes && items() < 4 * threads) most /= 2;
    const int64_t blocks = (p.query_length + most - 1) / most;
    block_rows = round_up((p.query_length + blocks - 1) / blocks, kAmxLanes);
    row_blocks = (p.query_length + block_rows - 1) / block_rows;
  }

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  struct Block {
    int64_t batch, head, row, rows, lanes;
    uint16_t* query;                               // B operands: [lane offset · head_dim][head_dim / 2][lane][2]
    float* out;                                    // [lane offset · value_dim][value_dim][lane]
    float *maximum, *old_maximum, *sum, *rescale;  // [lane]
    float *bias, *staging;                         // one tile: [key][lane]
    const PhiloxPanel* philox;
    uint16_t* weights;  // a B operand
  };

  // A block of keys as A operands: keys by rows, values transposed.
  struct KeyBlock {
    int64_t key, keys, all_keys;  // all_keys: with padding
    TileOperand key_rows, value_columns;
    BiasTile<float> bias;        // of a mask that has one number for each key
    PhiloxPanel::Groups groups;  // with dropout
    uint16_t *key_memory, *value_memory;
    float* bias_memory;
  };
  static constexpr int64_t kMostKeyBlocks = 16;

  // A panel's scores with a block of keys.
  struct Tile {
    int64_t offset;
    const KeyBlock* keys;
    KeySpan span;
    float* scores;   // [key][lane], divided by factor
    uint32_t* kept;  // by DropoutPairs
    float factor;
    bool rescaled;          // see settle_maximum
    const char* next_mask;  // the element that the next tile's mask starts with
  };

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
    constexpr int64_t tile = kAmxKeys * kAmxLanes;

    block.query = scratch.take<uint16_t>(kPieces * block.lanes * head_dim);
    block.out = scratch.take<float>(block.lanes * value_dim);
    for (float** array : {&block.maximum, &block.old_maximum, &block.sum, &block.rescale}) {
      *array = scratch.take<float>(block.lanes);
    }
    Tile tiles[2];
    for (Tile& memory : tiles) {
      memory.scores = scratch.take<float>(tile);
      memory.kept = scratch.take<uint32_t>(p.dropout_p > 0 ? kAmxKeys / 2 * kAmxVectors : 0);
    }
    block.bias = scratch.take<float>(stage.mask ? tile : 0);
    block.staging = scratch.take<float>(stage.mask ? tile : 0);
    block.weights = scratch.take<uint16_t>(kPieces * tile);
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

    load_query(block, scratch);
    start(block);
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const PhiloxPanel philox(dropout, p.dropout_batch_head(block.batch, block.head));
    block.philox = &philox;
    // Groups of keys that share random bits are not torn.
    const int64_t first_key = p.dropout_p > 0 ? round_down(range.begin, Dropout::kKeysPerCall) : range.begin;
    const int64_t panels = block.lanes / kAmxLanes, span_keys = most * key_block_size;
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
      const NextRows next(p, block.batch, kv_head, end, span_keys, range.end - end, panels * count);
      Tile *now = &tiles[0], *waiting = nullptr;
      for (int64_t i = 0; i < panels * count; ++i) {
        const int64_t then = (i + 1) / count, offset = then < panels ? then * kAmxLanes : 0;  // of the next panel
        RowsAhead ahead;
        next.add_share(i, ahead);
        const int64_t next_row = block.row + offset, next_key = then < panels ? key_blocks[(i + 1) % count].key : end;
        if (reads_mask && !adds_beside(stage)) {
          add_bias(stage.mask_rows, next_row, smaller(kAmxLanes, block.rows - offset), next_key, key_block_size, ahead);
        }
        now->next_mask = adds_beside(stage) ? next_mask_of(stage, next_row, next_key) : nullptr;
        now->offset = i / count * kAmxLanes;
        now->keys = &key_blocks[i % count];
        if (add_scores(block, *now, waiting, stage, ahead)) {
          waiting = now;
          now = &tiles[now == &tiles[0] ? 1 : 0];
        }
        ahead.ask_for_rest();
      }
      if (waiting != nullptr) add_values(block, *waiting);
    }
    finish(block, scratch);
  }

  void load_query(const Block& block, Scratch& scratch) const {
    auto* memory = scratch.take<uint16_t>(kPieces * block.rows * head_dim);
    Source<Stored> rows(p.query, block.batch, block.head, block.row, block.rows, p.head_dim, block.rows, head_dim,
                        memory, infinite);
    for (int64_t offset = 0; offset < block.lanes; offset += kAmxLanes) {
      rows.lanes(block.query + offset * head_dim, block.lanes * head_dim, offset, kAmxLanes);
    }
  }

  void start(const Block& block) const {
    const float lowest = -__builtin_inff();
    float sink = lowest;
    if (p.sinks.defined()) sink = head_number<float>(p.sinks, block.batch, block.head);
    fill<float>(block.maximum, sink, block.lanes);
    fill<float>(block.sum, sink == lowest ? 0 : 1, block.lanes);
    fill<float>(block.out, 0, block.lanes * value_dim);
  }

  // The scores of one panel, up to its new maximum; false if it attends none of the keys. The panel before, which waits
  // with its scores, is finished meanwhile: products alone leave the vector units idle, and exponentials the tiles.
  TA_NOINLINE bool add_scores(const Block& block, Tile& tile, const Tile* waiting, const ScoreStage<float>& stage,
                              RowsAhead& ahead) const {
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
      (this->*(p.dropout_p > 0 ? &AmxForward::multiply_keys<true, kParts> : &AmxForward::multiply_keys<false, kParts>))(
          block, tile, waiting);
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
    if (!is_beside) multiply_waiting(ask);

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

  // The dots of a panel; beside them what dropout keeps, and the weights of the panel that waits, kParts of
  // SoftmaxPairs in each step.
  template <bool kDropout, int kParts>
  TA_NOINLINE void multiply_keys(const Block& block, const Tile& tile, const Tile* waiting) const {
    const KeyBlock& keys = *tile.keys;
    const int64_t begin = tile.span.begin, count = tile.span.end - begin;
    const int64_t m_tiles = count / kTileSide, steps = head_dim / kTileDepth;
    const TileOperand key_operand = keys.key_rows.from_row(begin);
    const TileOperand query_operand{block.query + tile.offset * head_dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                    block.lanes * head_dim * 2};
    float* scores = tile.scores + begin * kAmxLanes;
    SoftmaxPairs<Stored, kDropout, kParts> softmax;
    if (waiting != nullptr) softmax = softmax_of<kDropout, kParts>(block, *waiting);
    if constexpr (kDropout) {
      DropoutPairs<kParts / 4> drop(*block.philox, keys.groups, dropout.limit, block.row + tile.offset,
                                    begin / Dropout::kKeysPerCall, count / Dropout::kKeysPerCall,
                                    tile.kept + begin / 2);
      BothBeside both{drop, softmax};
      tile_product_beside<false, kDots<Stored>>(m_tiles, kAmxVectors, steps, key_operand, query_operand, scores,
                                                kAmxLanes, both);
      drop.finish();
    } else {
      tile_product_beside<false, kDots<Stored>>(m_tiles, kAmxVectors, steps, key_operand, query_operand, scores,
                                                kAmxLanes, softmax);
    }
    if (waiting != nullptr) softmax.finish(block.rescale + waiting->offset, block.sum + waiting->offset);
  }

  template <bool kDropout, int kParts>
  TA_INLINE SoftmaxPairs<Stored, kDropout, kParts> softmax_of(const Block& block, const Tile& tile) const {
    return {tile.span.begin, tile.span.end, tile.factor, tile.scores, tile.kept, block.maximum + tile.offset,
            block.weights};
  }

  // Finishes a panel that waits.
  TA_NOINLINE void add_values(const Block& block, const Tile& tile) const {
    const auto weigh = [&]<bool kDropout>() TA_INLINE_LAMBDA {
      softmax_of<kDropout, 0>(block, tile).finish(block.rescale + tile.offset, block.sum + tile.offset);
    };
    p.dropout_p > 0 ? weigh.template operator()<true>() : weigh.template operator()<false>();
    RowsAhead nothing;
    AskBeside<Stored> ask(nothing);
    multiply_values(block, tile, ask);
  }

  int64_t value_portions(const Tile& tile) const {
    return AskBeside<Stored>::portions(value_dim / kTileSide, kAmxVectors,
                                       (tile.span.end - tile.span.begin) / kTileDepth);
  }

  // Adds a panel's weighted values to its output.
  template <class Product>
  TA_INLINE void multiply_values(const Block& block, const Tile& tile, const Product& product) const {
    float* out = block.out + tile.offset * value_dim;
    const float* rescale = block.rescale + tile.offset;
    if (tile.rescaled) {
      for (int64_t i = 0; i < value_dim * kAmxLanes; i += kLanes<float>) {
        store(out + i, load(out + i) * load(rescale + i % kAmxLanes));
      }
    }
    const TileOperand value_operand = tile.keys->value_columns.from_depth(tile.span.begin);
    const TileOperand weight_operand{block.weights, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                     kAmxKeys * kAmxLanes * 2};
    product.template multiply<true, kSums<Stored>>(value_dim / kTileSide, kAmxVectors,
                                                   (tile.span.end - tile.span.begin) / kTileDepth, value_operand,
                                                   weight_operand, out, kAmxLanes);
  }

  void finish(const Block& block, Scratch& scratch) const {
    using Softmax = OnlineSoftmax<VectorMath<float>>;
    const float keep_scale = p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
    float* rows = scratch.take<float>(kAmxLanes * value_dim);
    for (int64_t i = 0; i < block.lanes; i += kLanes<float>) {
      const Vec<float> sum = load(block.sum + i);
      store(block.maximum + i, Softmax::logsumexp(load(block.maximum + i), sum));
      store(block.sum + i, Softmax::inverse_sum(sum) * keep_scale);
    }
    float* logsumexp = static_cast<float*>(outputs.logsumexp) + p.first_row(block.batch, block.head) + block.row;
    __builtin_memcpy(logsumexp, block.maximum, block.rows * sizeof(float));
    for (int64_t offset = 0; offset < block.lanes; offset += kAmxLanes) {
      store_panel(outputs.out, block.batch, block.head, block.row + offset, smaller(kAmxLanes, block.rows - offset),
                  p.value_dim, block.out + offset * value_dim, kAmxLanes, block.sum + offset, rows);
    }
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
