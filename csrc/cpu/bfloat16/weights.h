// The first product of ../map_weights.h by those of tiles.h. Included by map_kernels.h.
#pragma once

#include "../map_weights.h"
#include "operands.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Dots become scores where they need nothing but the factor; maximum is raised to include them if it is not null.
template <int kVectors>
TA_NOINLINE void scale_scores(int64_t begin, int64_t end, float factor, float* scores, float* maximum) {
  constexpr int n_lanes = kLanes<float>;
  Vec<float> highest[kVectors] = {};
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) highest[n] = maximum == nullptr ? splat(0.0f) : load(maximum + n * n_lanes);
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* place = scores + j * kVectors * n_lanes + n * n_lanes;
      const Vec<float> score = load(place) * factor;
      highest[n] = max(highest[n], score);
      store(place, score);
    }
  }
  if (maximum == nullptr) return;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) store(maximum + n * n_lanes, highest[n]);
}

// A panel is 32 or 64 rows: with more of them, keys and values, which come from the L2 cache, are read less often.
template <class Stored>
struct AmxPanel {
  using Real = float;
  static constexpr int kPieces = kPiecesOf<Stored>;
  static constexpr int64_t kRows = 2 * kAmxLanes;
  static constexpr int64_t kKeys = kAmxKeys / 2;
  static constexpr int64_t kPaddedKeys = kTileDepth;
  static constexpr bool kCombines = false;  // joint_weights.h and softmax_weights.h do

  // All keys and, transposed, values, padded to whole tiles once for all panels of rows, in blocks of keys:
  // [batch · kv head][block][key][column] and [batch · kv head][block][column][key], or the same in pieces.
  struct Shared {
    int64_t key_columns, value_columns, blocks;
    mutable bool infinite = false;  // see operands.h
    uint16_t *keys, *values = nullptr;

    Shared(const AttentionProblem& p, bool with_output, const Parallel& parallel, Scratch& scratch)
        : key_columns(round_up(p.head_dim, kTileDepth)),
          value_columns(round_up(p.value_dim, kTileDepth)),
          blocks((p.key_length + kKeys - 1) / kKeys) {
      const int64_t all_keys = p.batch * p.kv_heads * blocks * kKeys;
      keys = scratch.take<uint16_t>(kPieces * all_keys * key_columns);
      if (with_output) values = scratch.take<uint16_t>(kPieces * all_keys * value_columns);
      for_each_item(parallel, p.batch * p.kv_heads * blocks, [&](int64_t item, Scratch& memory) {
        const int64_t key = item % blocks * kKeys, kv_head = item / blocks % p.kv_heads;
        const int64_t batch = item / blocks / p.kv_heads, count = smaller(kKeys, p.key_length - key);
        uint16_t* copy = keys + item * kPieces * kKeys * key_columns;
        if constexpr (kPieces > 1) {
          Source<Stored>(p.key, batch, kv_head, key, count, p.head_dim, kKeys, key_columns, copy, &infinite).by_rows();
        } else {
          const HalfRows rows = half_rows(p.key, batch, kv_head, key, count, p.head_dim, kKeys, key_columns, copy);
          for (int64_t i = 0; rows.data != copy && i < kKeys; ++i)
            __builtin_memcpy(copy + i * key_columns, rows.data + i * rows.stride, key_columns * sizeof(uint16_t));
        }
        if (!with_output) return;
        auto* rows = memory.take<uint16_t>(kPieces * kKeys * value_columns);
        auto* pairs = memory.take<uint16_t>(kKeys * value_columns);
        Source<Stored>(p.value, batch, kv_head, key, count, p.value_dim, kKeys, value_columns, rows, &infinite)
            .by_columns(values + item * kPieces * kKeys * value_columns, pairs);
      });
    }
    int64_t block(const AttentionProblem& p, int64_t batch, int64_t head, int64_t key) const {
      return (batch * p.kv_heads + head / (p.heads / p.kv_heads)) * blocks + key / kKeys;
    }
    // A block's keys by rows and values by columns.
    TileOperand keys_of(int64_t block) const {
      const uint16_t* place = keys + block * kPieces * kKeys * key_columns;
      if constexpr (kPieces == 1) return {place, key_columns * 2, kTileDepth * 2};
      return {place, kTileDepth * 2, kKeys * kTileDepth * 2, kKeys * key_columns * 2};
    }
    TileOperand values_of(int64_t block) const {
      const uint16_t* place = values + block * kPieces * kKeys * value_columns;
      if constexpr (kPieces == 1) return {place, kKeys * 2, kTileDepth * 2};
      return {place, kTileDepth * 2, value_columns * kTileDepth * 2, kKeys * value_columns * 2};
    }
  };

  const AttentionProblem& p;
  const Shared& shared;
  TileSession session;
  TileScratch<float> tile;
  uint16_t *query, *row_memory;
  int64_t batch = 0, head = 0, row = 0, rows = 0;

  AmxPanel(const AttentionProblem& problem, const Shared& state, Scratch& scratch)
      : p(problem), shared(state), tile(problem, scratch) {
    query = scratch.take<uint16_t>(kPieces * kRows * shared.key_columns);
    row_memory = scratch.take<uint16_t>(kPieces * kRows * shared.key_columns);
  }

  void start(int64_t new_batch, int64_t new_head, int64_t first_row, int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    Source<Stored> in(p.query, batch, head, row, rows, p.head_dim, rows, shared.key_columns, row_memory,
                      &shared.infinite);
    in.lanes(query, kRows * shared.key_columns, 0, rows > kAmxLanes ? kRows : kAmxLanes);
  }

  template <class Body>
  TA_INLINE void with_width(const Body& body) const {
    rows > kAmxLanes ? body.template operator()<2 * kAmxVectors>() : body.template operator()<kAmxVectors>();
  }

  template <int kVectors>
  TA_NOINLINE bool scores(const ScoreStage<float>& stage, int64_t key, int64_t keys, float* out, float* maximum) {
    constexpr int64_t width = kVectors * kLanes<float>;
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, round_up(keys, kTileDepth), kTileDepth);
    BiasTile<float> bias;
    if (span.empty() || !load_bias<float, kVectors>(stage, tile, row, rows, key, span, bias)) return false;
    const TileOperand key_operand = shared.keys_of(shared.block(p, batch, head, key)).from_row(span.begin);
    const TileOperand query_operand{query, width * 4, kTileDepth / 2 * width * 4, kRows * shared.key_columns * 2};
    tile_product<false, kDots<Stored>>((span.end - span.begin) / kTileSide, kVectors, shared.key_columns / kTileDepth,
                                       key_operand, query_operand, out + span.begin * width, width);
    const float nothing = -__builtin_inff();
    fill<float>(out, nothing, span.begin * width);
    if (span.end < keys) fill<float>(out + span.end * width, nothing, (keys - span.end) * width);
    if (stage.changes_elements(bias) || span.has_edges()) {
      modify_scores<float, kVectors>(stage, bias, span.has_edges(), row, key, span.begin, span.end, stage.dot_factor(),
                                     out, nullptr, maximum);
    } else {
      scale_scores<kVectors>(span.begin, span.end, stage.dot_factor(), out, maximum);
    }
    return true;
  }

  static TA_INLINE Vec<float> exp(Vec<float> x) { return exp_for<Stored>(x); }

  // Neighbouring keys become one 32-bit element, so that a transposed tile holds 32 keys of a row.
  template <int kVectors>
  static TA_NOINLINE int64_t write(const TensorView& out, char* columns, const float* weights, const float* factor,
                                   int64_t rows, int64_t keys) {
    constexpr int n_lanes = kLanes<float>, width = kVectors * n_lanes;
    if constexpr (sizeof(Stored) == 4) {
      const int64_t done = round_down(keys, n_lanes);
      if (done > 0) unpack_panel(reinterpret_cast<float*>(columns), out.stride[2], weights, width, factor, rows, done);
      return done;
    }
    if constexpr (kPieces > 1) return 0;
    const int64_t done = round_down(keys, 2 * n_lanes);
    for (int64_t i = 0; i < rows; i += n_lanes) {
      const Vec<float> multiplier = load(factor + i);
      for (int64_t j = 0; j < done; j += 2 * n_lanes) {
        const float* place = weights + j * width + i;
        char* to = columns + (i * out.stride[2] + j) * sizeof(uint16_t);
        Vec<float> lanes[n_lanes];
#pragma GCC unroll 16
        for (int pair = 0; pair < n_lanes; ++pair) {
          const float* first = place + 2 * pair * width;
          lanes[pair] = (Vec<float>)pairs_of(load(first) * multiplier, load(first + width) * multiplier);
        }
        transpose_in_registers<float>(lanes);
#pragma GCC unroll 16
        for (int lane = 0; lane < n_lanes; ++lane)
          if (i + lane < rows) _mm512_storeu_si512(to + lane * out.stride[2] * sizeof(uint16_t), (__m512i)lanes[lane]);
      }
    }
    return done;
  }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
