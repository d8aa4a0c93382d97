// The forward pass by products of bfloat16: the same walk over the keys as ../forward.h, whose comments apply, with the
// products of tiles.h. Weights are rounded to bfloat16, or split (pieces.h), for the second product; their sum is not.
// Included by kernels.h.
#pragma once

#include "../forward.h"
#include "dropout_pairs.h"
#include "masked_scores.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kAmxRows = 512;

// A panel walks over so many bytes of keys and values before the next one does. A mask's rows are then read in pieces
// long enough for memory: with one block of keys at a time, masks cost 1.4 (float) to 3 times (boolean, 8192 keys) as
// much. Twice as many bytes gain 3 % more there, and lose 1 % without a mask at head_dim 128. One block at a time is 1
// to 4 % slower without a mask in bfloat16, but 2 % faster in float32, whose keys and values are three pieces each.
constexpr int64_t kSpanBytes = 256 * 1024;

// Asks for rows beside tile products: in larger portions rows would wait for each other, and the products after them.
// Products of numbers in pieces take so long that they ask once; beside each, float32 would be 3 % slower.
template <class Stored>
class AskBeside {
 public:
  TA_INLINE AskBeside(RowsAhead& ahead) : ahead_(ahead) {}

  template <bool kAccumulate, PieceProducts kProducts>
  TA_NOINLINE void product(int64_t m_tiles, int64_t n_tiles, int64_t steps, TileOperand a, TileOperand b, float* c,
                           int64_t c_stride) {
    if constexpr (kPiecesOf<Stored> == 1) {
      tile_product_beside<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride, *this);
    } else {
      ask();
      tile_product<kAccumulate, kProducts>(m_tiles, n_tiles, steps, a, b, c, c_stride);
    }
  }
  // How many portions a product asks for.
  static TA_INLINE int64_t portions(int64_t m_tiles, int64_t n_tiles, int64_t steps) {
    return kPiecesOf<Stored> == 1 ? calls_beside<kOneProduct>(m_tiles, n_tiles, steps) : 1;
  }

  TA_INLINE void operator()(int64_t) { ask(); }
  TA_NOINLINE void ask() { ahead_.ask_for_portion(); }

 private:
  RowsAhead& ahead_;
};

// Keys per block. Measured on an Intel Xeon with AMX: 64 is 5 to 10 % faster than 128 at head_dim 64, whose tiles then
// stay in the L1 cache, and 10 % slower at 128, where each block's addition to the output weighs more.
TA_INLINE int64_t amx_key_block(const AttentionProblem& p) {
  return larger(p.head_dim, p.value_dim) > 64 ? kAmxKeys : kAmxKeys / 2;
}

// maximum[lane] is raised to include factor times the dots of keys [begin, end); factor > 0.
TA_NOINLINE inline void raise_maximum(int64_t begin, int64_t end, float factor, const float* dots, float* maximum) {
  Vec<float> highest[2 * kAmxVectors];
#pragma GCC unroll 4
  for (int n = 0; n < 2 * kAmxVectors; ++n) highest[n] = load(dots + begin * kAmxLanes + n * kLanes<float>);
  for (int64_t j = begin + 2; j < end; j += 2) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * kAmxVectors; ++n)
      highest[n] = max(highest[n], load(dots + j * kAmxLanes + n * kLanes<float>));
  }
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) {
    float* place = maximum + n * kLanes<float>;
    store(place, max(load(place), max(highest[n], highest[n + kAmxVectors]) * factor));
  }
}

// Scores (divided by factor) become weights, stored as the pairs of a B operand that starts at key begin and has pieces
// of kAmxKeys keys; sum is brought up to date. kept is DropoutPairs'. ask, if it is not
// null, asks after each vector of lanes.
template <class Stored, bool kDropout>
TA_NOINLINE void softmax_pairs(int64_t begin, int64_t end, float factor, const float* scores, const uint32_t* kept,
                               const float* maximum, const float* rescale, float* sum, uint16_t* pairs,
                               AskBeside<Stored>* ask = nullptr) {
  using Math = VectorMath<float>;
  constexpr int n_lanes = kLanes<float>;
  constexpr int64_t kPieceStride = kAmxKeys * kAmxLanes;
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) {
    const Vec<float> subtracted = OnlineSoftmax<Math>::safe_maximum(load(maximum + n * n_lanes));
    Vec<float> even_sum{}, odd_sum{};
    for (int64_t j = begin; j < end; j += 2) {
      const int64_t place = j * kAmxLanes + n * n_lanes;
      const Vec<float> even = exp_for<Stored>(load(scores + place) * factor - subtracted);
      const Vec<float> odd = exp_for<Stored>(load(scores + place + kAmxLanes) * factor - subtracted);
      even_sum += even;
      odd_sum += odd;
      uint16_t* to = pairs + (j - begin) * kAmxLanes + 2 * n * n_lanes;
      if constexpr (kDropout) {
        store_pairs<Stored>(to, kPieceStride, even, odd, kept[(n * kAmxKeys + j) / 2]);
      } else {
        store_pairs<Stored>(to, kPieceStride, even, odd);
      }
    }
    float* total = sum + n * n_lanes;
    store(total, load(total) * load(rescale + n * n_lanes) + (even_sum + odd_sum));
    if (ask != nullptr) ask->ask();
  }
}

// How far (as a logarithm) weights may exceed 1 before the maximum that is subtracted from the scores is moved.
constexpr float kMaximumSlack = 8.0f;

// Keeps the old maximum where the new one is hardly larger: any number near the maximum serves as well, and with it the
// output so far stays as it is. Sets rescale[lane], what the output is multiplied by; false if that is 1 everywhere.
TA_INLINE bool settle_maximum(const float* old_maximum, float* maximum, float* rescale) {
  bool changed = false;
  for (int n = 0; n < kAmxVectors; ++n) {
    const Vec<float> before = load(old_maximum + n * kLanes<float>), highest = load(maximum + n * kLanes<float>);
    const Vec<float> now = highest > before + kMaximumSlack ? highest : before;
    store(maximum + n * kLanes<float>, now);
    store(rescale + n * kLanes<float>, OnlineSoftmax<VectorMath<float>>::rescale(before, now));
    changed = changed || _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ) != 0;
  }
  return changed;
}

template <class Stored>
struct AmxForward {
  static constexpr int kPieces = kPiecesOf<Stored>;
  using Ask = AskBeside<Stored>;

  const AttentionProblem& p;
  const ForwardOutputs& outputs;
  Dropout dropout;
  int64_t block_rows, row_blocks;
  int64_t head_dim, value_dim;  // padded to whole tile depths

  AmxForward(const AttentionProblem& problem, const ForwardOutputs& out, int threads)
      : p(problem),
        outputs(out),
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
    float *scores, *bias, *staging;                // one tile: [key][lane]
    uint32_t* kept;                                // of the same tile, by DropoutPairs
    uint16_t* weights;                             // a B operand
  };

  // A block of keys as A operands: keys by rows, values transposed.
  struct KeyBlock {
    int64_t key, keys, all_keys;  // all_keys: with padding
    HalfRows key_rows;
    HalfRows values;             // [value_dim][all_keys]
    BiasTile<float> bias;        // of a mask that has one number for each key
    PhiloxPanel::Groups groups;  // with dropout
    uint16_t *key_scratch, *value_memory;
    float* bias_memory;
  };

  static constexpr int64_t kMostKeyBlocks = 16;

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
    block.scores = scratch.take<float>(tile);
    block.kept = scratch.take<uint32_t>(p.dropout_p > 0 ? kAmxKeys / 2 * kAmxVectors : 0);
    block.bias = scratch.take<float>(stage.mask ? tile : 0);
    block.staging = scratch.take<float>(stage.mask ? tile : 0);
    block.weights = scratch.take<uint16_t>(kPieces * tile);
    auto* value_scratch = scratch.take<uint16_t>(kPieces * kAmxKeys * packed_values);
    auto* value_pairs = scratch.take<uint16_t>(kAmxKeys * packed_values);
    const int64_t key_block_size = amx_key_block(p);
    const int64_t block_bytes = kPieces * key_block_size * (head_dim + packed_values) * 2;
    const bool reads_mask = stage.mask && !stage.mask_is_per_key();
    const int64_t most = kPieces < 3 || reads_mask ? smaller(kMostKeyBlocks, kSpanBytes / block_bytes) : 0;
    const int64_t most_blocks = larger<int64_t>(most, 1);
    KeyBlock key_blocks[kMostKeyBlocks];
    for (int64_t i = 0; i < most_blocks; ++i) {
      key_blocks[i].key_scratch = scratch.take<uint16_t>(kPieces * key_block_size * head_dim);
      key_blocks[i].value_memory = scratch.take<uint16_t>(kPieces * key_block_size * packed_values);
      key_blocks[i].bias_memory = scratch.take<float>(stage.mask_is_per_key() ? key_block_size : 0);
    }

    load_query(block, scratch);
    start(block);
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    const PhiloxPanel philox(dropout, p.dropout_batch_head(block.batch, block.head));
    // Groups of keys that share random bits are not torn.
    const int64_t first_key = p.dropout_p > 0 ? round_down(range.begin, Dropout::kKeysPerCall) : range.begin;
    const int64_t panels = block.lanes / kAmxLanes, span_keys = most_blocks * key_block_size;
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
        keys.key_rows = half_rows<Stored>(p.key, block.batch, kv_head, key, keys.keys, p.head_dim, keys.all_keys,
                                          head_dim, keys.key_scratch);
        const HalfRows value_rows = half_rows<Stored>(p.value, block.batch, kv_head, key, keys.keys, p.value_dim,
                                                      keys.all_keys, packed_values, value_scratch);
        keys.values = {keys.value_memory, keys.all_keys, keys.all_keys * packed_values};
        for (int piece = 0; piece < kPieces; ++piece) {
          transpose_rows(keys.value_memory + piece * keys.values.piece_stride, value_rows.piece(piece), keys.all_keys,
                         packed_values, value_pairs);
        }
        if (p.dropout_p > 0) {
          philox.groups(key / Dropout::kKeysPerCall, keys.all_keys / Dropout::kKeysPerCall, keys.groups);
        }
        ++count;
      }
      const NextRows next(p, block.batch, kv_head, end, span_keys, range.end - end, panels * count);
      for (int64_t i = 0; i < panels * count; ++i) {
        const int64_t then = (i + 1) / count, offset = then < panels ? then * kAmxLanes : 0;  // of the next panel
        RowsAhead ahead;
        next.add_share(i, ahead);
        add_bias(stage.mask_rows, block.row + offset, smaller(kAmxLanes, block.rows - offset),
                 then < panels ? key_blocks[(i + 1) % count].key : end, key_block_size, ahead);
        add_keys(block, i / count * kAmxLanes, stage, philox, key_blocks[i % count], ahead);
        ahead.ask_for_rest();
      }
    }
    finish(block, scratch);
  }

  void load_query(const Block& block, Scratch& scratch) const {
    auto* memory = scratch.take<uint16_t>(kPieces * block.rows * head_dim);
    const HalfRows rows = half_rows<Stored>(p.query, block.batch, block.head, block.row, block.rows, p.head_dim,
                                            block.rows, head_dim, memory);
    for (int64_t offset = 0; offset < block.lanes; offset += kAmxLanes) {
      for (int piece = 0; piece < kPieces; ++piece) {
        pack_pairs(block.query + piece * block.lanes * head_dim + offset * head_dim, kAmxLanes,
                   rows.piece(piece).from_row(offset), block.rows - offset, head_dim);
      }
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

  TA_NOINLINE void add_keys(const Block& block, int64_t offset, const ScoreStage<float>& stage,
                            const PhiloxPanel& philox, const KeyBlock& keys, RowsAhead& ahead) const {
    const int64_t row = block.row + offset, rows = smaller(kAmxLanes, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, keys.key, keys.all_keys, kTileDepth);
    if (span.empty()) return;
    BiasTile<float> bias = keys.bias;
    MaskedPanel masked;
    MaskEffect effect = MaskEffect::kNone;
    if (MaskedPanel::serves(stage, rows, span)) {
      effect = masked.load(stage.mask_rows, row, keys.key, span);
      if (effect == MaskEffect::kExcludesAll) return;
    } else if (stage.mask && !stage.mask_is_per_key() &&
               !load_bias_per_lane(stage.mask_rows, row, rows, kAmxLanes, keys.key, span.begin, span.end, block.staging,
                                   block.bias, bias)) {
      return;
    }
    const int64_t count = span.end - span.begin;
    const int64_t score_tiles = count / kTileSide, head_steps = head_dim / kTileDepth;
    const int64_t value_tiles = value_dim / kTileSide, steps = count / kTileDepth;
    ahead.divide((p.dropout_p > 0 ? 1 : Ask::portions(score_tiles, kAmxVectors, head_steps)) + 2 + kAmxVectors +
                 Ask::portions(value_tiles, kAmxVectors, steps));
    Ask ask(ahead);
    const TileOperand key_operand = keys.key_rows.operand(span.begin, 0);
    const TileOperand query_operand{block.query + offset * head_dim, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                    block.lanes * head_dim * 2};
    if (p.dropout_p > 0) {
      ask.ask();
      add_scores_and_dropout(block, row, philox, keys, span, key_operand, query_operand);
    } else {
      ask.template product<false, kDots<Stored>>(score_tiles, kAmxVectors, head_steps, key_operand, query_operand,
                                                 block.scores + span.begin * kAmxLanes, kAmxLanes);
    }

    ahead.ask_for_portion();
    float *maximum = block.maximum + offset, *old_maximum = block.old_maximum + offset,
          *rescale = block.rescale + offset;
    __builtin_memcpy(old_maximum, maximum, kAmxLanes * sizeof(float));
    float factor = stage.dot_factor();
    if (effect == MaskEffect::kSome) {
      factor = masked.apply<true>(span, factor, block.scores, maximum);
    } else if (stage.changes_elements(bias) || span.has_edges() || !(factor > 0)) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, keys.key, span.begin, span.end, factor,
                                        block.scores, nullptr, maximum);
      factor = 1;
    } else {
      raise_maximum(span.begin, span.end, factor, block.scores, maximum);
    }
    ahead.ask_for_portion();
    const bool rescaled = settle_maximum(old_maximum, maximum, rescale);
    (p.dropout_p > 0 ? softmax_pairs<Stored, true>
                     : softmax_pairs<Stored, false>)(span.begin, span.end, factor, block.scores, block.kept, maximum,
                                                     rescale, block.sum + offset, block.weights, &ask);
    float* out = block.out + offset * value_dim;
    if (rescaled) {
      for (int64_t i = 0; i < value_dim * kAmxLanes; i += kLanes<float>) {
        store(out + i, load(out + i) * load(rescale + i % kAmxLanes));
      }
    }
    const TileOperand value_operand = keys.values.operand(0, span.begin);
    const TileOperand weight_operand{block.weights, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4,
                                     kAmxKeys * kAmxLanes * 2};
    ask.template product<true, kSums<Stored>>(value_tiles, kAmxVectors, steps, value_operand, weight_operand, out,
                                              kAmxLanes);
  }

  // The scores, and beside them what dropout keeps: products alone leave the vector units idle.
  TA_NOINLINE void add_scores_and_dropout(const Block& block, int64_t row, const PhiloxPanel& philox,
                                          const KeyBlock& keys, const KeySpan& span, const TileOperand& key_operand,
                                          const TileOperand& query_operand) const {
    const int64_t count = span.end - span.begin, m_tiles = count / kTileSide, steps = head_dim / kTileDepth;
    DropoutPairs beside(philox, keys.groups, dropout.limit, row, span.begin / Dropout::kKeysPerCall,
                        count / Dropout::kKeysPerCall, m_tiles * kAmxVectors * steps * kDots<Stored>.count(),
                        block.kept + span.begin / 2);
    tile_product_beside<false, kDots<Stored>>(m_tiles, kAmxVectors, steps, key_operand, query_operand,
                                              block.scores + span.begin * kAmxLanes, kAmxLanes, beside);
    beside.finish();
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
