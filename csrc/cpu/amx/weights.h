// The two products of ../map_weights.h on AMX, for bfloat16. Included by instantiate/map_amx.cpp.
#pragma once

#include "../map_weights.h"
#include "panel.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Dots become scores where they need nothing but the factor; maximum is raised to include them if it is not null.
TA_NOINLINE void scale_scores(int64_t begin, int64_t end, float factor, float* scores, float* maximum) {
  constexpr int n_lanes = kLanes<float>;
  Vec<float> highest[kAmxVectors] = {};
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) highest[n] = maximum == nullptr ? splat(0.0f) : load(maximum + n * n_lanes);
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      float* place = scores + j * kAmxLanes + n * n_lanes;
      const Vec<float> score = load(place) * factor;
      highest[n] = max(highest[n], score);
      store(place, score);
    }
  }
  if (maximum == nullptr) return;
#pragma GCC unroll 2
  for (int n = 0; n < kAmxVectors; ++n) store(maximum + n * n_lanes, highest[n]);
}

struct AmxPanel {
  using Real = float;
  static constexpr int64_t kRows = kAmxLanes;
  static constexpr int64_t kKeys = kAmxKeys / 2;
  static constexpr int64_t kPaddedKeys = kTileDepth;

  // All values, transposed once for all panels of rows: [batch · kv head][block of keys][column][key].
  struct Shared {
    int64_t columns, blocks;
    uint16_t* values = nullptr;

    Shared(const AttentionProblem& p, bool with_output, const Parallel& parallel, Scratch& scratch)
        : columns(round_up(p.value_dim, kTileDepth)), blocks((p.key_length + kKeys - 1) / kKeys) {
      if (!with_output) return;
      values = scratch.take<uint16_t>(p.batch * p.kv_heads * blocks * columns * kKeys);
      for_each_item(parallel, p.batch * p.kv_heads * blocks, [&](int64_t item, Scratch& memory) {
        const int64_t key = item % blocks * kKeys, kv_head = item / blocks % p.kv_heads;
        auto* rows = memory.take<uint16_t>(kKeys * columns);
        auto* pairs = memory.take<uint16_t>(kKeys * columns);
        const HalfRows in = half_rows(p.value, item / blocks / p.kv_heads, kv_head, key,
                                      smaller(kKeys, p.key_length - key), p.value_dim, kKeys, columns, rows);
        transpose_rows(values + item * columns * kKeys, in, kKeys, columns, pairs);
      });
    }
    const uint16_t* block(const AttentionProblem& p, int64_t batch, int64_t kv_head, int64_t key) const {
      return values + ((batch * p.kv_heads + kv_head) * blocks + key / kKeys) * columns * kKeys;
    }
  };

  const AttentionProblem& p;
  const Shared& shared;
  TileSession session;
  TileScratch<float> tile;
  int64_t head_dim;  // padded to whole tile depths
  uint16_t *query, *row_memory, *key_scratch, *pairs;
  int64_t batch = 0, head = 0, row = 0, rows = 0;

  AmxPanel(const AttentionProblem& problem, const Shared& state, Scratch& scratch)
      : p(problem), shared(state), tile(problem, scratch), head_dim(round_up(problem.head_dim, kTileDepth)) {
    query = scratch.take<uint16_t>(kRows * head_dim);
    row_memory = scratch.take<uint16_t>(kRows * head_dim);
    key_scratch = scratch.take<uint16_t>(kKeys * head_dim);
    pairs = scratch.take<uint16_t>(kKeys * kRows);
  }

  void start(int64_t new_batch, int64_t new_head, int64_t first_row, int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    const HalfRows loaded = half_rows(p.query, batch, head, row, rows, p.head_dim, rows, head_dim, row_memory);
    pack_pairs(query, kRows, loaded, rows, head_dim);
  }

  template <class Body>
  TA_INLINE void with_width(const Body& body) const {
    body.template operator()<kAmxVectors>();
  }

  template <int kVectors>
  TA_NOINLINE bool scores(const ScoreStage<float>& stage, int64_t key, int64_t keys, float* out, float* maximum) {
    static_assert(kVectors == kAmxVectors);
    const int64_t all_keys = round_up(keys, kTileDepth);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, all_keys, kTileDepth);
    BiasTile<float> bias;
    if (span.empty() || !load_bias<float, kVectors>(stage, tile, row, rows, key, span, bias)) return false;
    const HalfRows key_rows =
        half_rows(p.key, batch, head / (p.heads / p.kv_heads), key, keys, p.head_dim, all_keys, head_dim, key_scratch);
    const TileOperand key_operand{key_rows.data + span.begin * key_rows.stride, key_rows.stride * 2, kTileDepth * 2};
    const TileOperand query_operand{query, kRows * 4, kTileDepth / 2 * kRows * 4};
    tile_product<false>((span.end - span.begin) / kTileSide, kVectors, head_dim / kTileDepth, key_operand,
                        query_operand, out + span.begin * kRows, kRows);
    const float nothing = -__builtin_inff();
    fill<float>(out, nothing, span.begin * kRows);
    if (span.end < keys) fill<float>(out + span.end * kRows, nothing, (keys - span.end) * kRows);
    if (stage.changes_elements(bias) || span.has_edges()) {
      modify_scores<float, kVectors>(stage, bias, span.has_edges(), row, key, span.begin, span.end, stage.dot_factor(),
                                     out, nullptr, maximum);
    } else {
      scale_scores(span.begin, span.end, stage.dot_factor(), out, maximum);
    }
    return true;
  }

  // Weights will be rounded to bfloat16.
  static TA_INLINE Vec<float> exp(Vec<float> x) { return exp_for_half(x); }

  template <int kVectors>
  TA_NOINLINE void combine(int64_t key, int64_t keys, const float* weights, float* out) {
    constexpr int n_lanes = kLanes<float>;
    const int64_t all_keys = round_up(keys, kTileDepth);
    for (int64_t j = 0; j < all_keys; j += 2) {
      for (int n = 0; n < kVectors; ++n) {
        const float* place = weights + j * kRows + n * n_lanes;
        store_pairs(pairs + j * kRows + 2 * n * n_lanes, j < keys ? load(place) : splat(0.0f),
                    j + 1 < keys ? load(place + kRows) : splat(0.0f));
      }
    }
    const uint16_t* values = shared.block(p, batch, head / (p.heads / p.kv_heads), key);
    const TileOperand value_operand{values, kKeys * 2, kTileDepth * 2};
    const TileOperand weight_operand{pairs, kRows * 4, kTileDepth / 2 * kRows * 4};
    tile_product<true>(value_columns() / kTileSide, kVectors, all_keys / kTileDepth, value_operand, weight_operand, out,
                       kRows);
  }

  int64_t value_columns() const { return round_up(p.value_dim, kTileSide); }
};

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
