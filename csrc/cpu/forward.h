// The forward pass: for each block of query rows, one walk over the keys that it attends (Dao et al. 2022, alg. 1).
// Included by instantiate/*.cpp.
#pragma once

#include "../core/online_softmax.h"
#include "decode.h"
#include "dropout_tile.h"
#include "kernel_table.h"
#include "query_block.h"
#include "row_product.h"
#include "score_tile.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A panel's scores and a block of keys and values should stay in the L1 and L2 caches. 48, 96 and 128 keys measured
// within 2 % of 64 (AVX-512, float32, head_dim 64 and 128).
constexpr int64_t kForwardKeys = 64;
constexpr int64_t kFewQueries = 16;  // see key_value_rows

// The softmax stage: scores, here divided by score_factor, become weights (not yet divided by their sum), in place, and
// the running sum is brought up to date. maximum is the new maximum, old_maximum what it was before this tile, divided
// alike; rescale gets the factor for the output. kept is dropout's.
template <class Real, int kVectors, bool kDropout>
TA_NOINLINE void softmax_tile(int64_t begin, int64_t end, Real score_factor, Real* scores,
                              KeptTile<Real, kVectors> kept, const Real* old_maximum, const Real* maximum, Real* sum,
                              Real* rescale) {
  using Math = VectorMath<Real>;
  using Softmax = OnlineSoftmax<Math>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> subtracted[kVectors], tile_sum[kVectors] = {};
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const Vec<Real> highest = load(maximum + n * n_lanes);
    store(rescale + n * n_lanes,
          Softmax::rescale(load(old_maximum + n * n_lanes) * score_factor, highest * score_factor));
    subtracted[n] = Softmax::safe_maximum(highest);
  }
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      Real* place = scores + j * width + n * n_lanes;
      const Vec<Real> weight = Math::exp(load(place) - subtracted[n], score_factor);
      tile_sum[n] += weight;
      if constexpr (kDropout) {
        store(place, kept_of(weight, kept.at(j, n)));
      } else {
        store(place, weight);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    store(sum + n * n_lanes, load(sum + n * n_lanes) * load(rescale + n * n_lanes) + tile_sum[n]);
  }
}

template <class Real>
struct Forward {
  const AttentionProblem& p;
  const ForwardOutputs& outputs;
  Dropout dropout;
  int64_t block_rows, row_blocks;

  Forward(const AttentionProblem& problem, const ForwardOutputs& out, int threads)
      : p(problem),
        outputs(out),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)),
        block_rows(query_block_rows<Real>(problem, threads)),
        row_blocks((p.query_length + block_rows - 1) / block_rows) {}

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  // The state of one block of rows while it walks over the keys.
  struct Block {
    int64_t batch, head, row, rows;
    bool at_once;  // one block of keys is all: each panel's output is complete, and stored, after its only tile
    Panels panels;
    Real *query, *out;                            // panels: [lane offset · dim][dim][lane]
    Real *maximum, *old_maximum, *sum, *rescale;  // [lane]
    Real *scores, *bias, *staging;                // one tile
    uint32_t* dropout;                            // of the same tile
  };

  void run(int64_t item, Scratch& scratch) const {
    Block block;
    block.batch = item / (p.heads * row_blocks);
    block.head = item / row_blocks % p.heads;
    block.row = (row_blocks - 1 - item % row_blocks) * block_rows;  // with a causal mask, long rows first
    block.rows = smaller(block_rows, p.query_length - block.row);
    block.panels.cut(block.rows, kLanes<Real>);
    const int64_t lanes = block.panels.lanes;
    ScoreStage<Real> stage(p, block.batch, block.head);
    if (!p.sinks.defined()) stage.leave_dots_raw();
    const int64_t kv_head = block.head / (p.heads / p.kv_heads);
    constexpr int64_t tile = kForwardKeys * kMaxVectors * kLanes<Real>;

    block.query = load_query_panels<Real>(p, block.batch, block.head, block.row, block.rows, block.panels, scratch);
    block.out = scratch.take<Real>(lanes * p.value_dim);
    for (Real** array : {&block.maximum, &block.old_maximum, &block.sum, &block.rescale})
      *array = scratch.take<Real>(lanes);
    block.scores = scratch.take<Real>(tile);
    block.dropout =
        scratch.take<uint32_t>(p.dropout_p > 0 ? dropout_words(kForwardKeys, kDropoutRows<Real, kMaxVectors>) : 0);
    block.bias = scratch.take<Real>(stage.mask ? tile : 0);
    block.staging = scratch.take<Real>(stage.mask ? tile : 0);
    Real* key_scratch = scratch.take<Real>(kForwardKeys * p.head_dim);
    Real* value_scratch = scratch.take<Real>(kForwardKeys * p.value_dim);

    const bool few_queries = block.rows <= kFewQueries;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    block.at_once = !range.empty() && range.end - range.begin <= kForwardKeys && has_row_product<Real>(p.value_dim);
    start(block);
    for (int64_t key = range.begin; key < range.end; key += kForwardKeys) {
      const int64_t keys = smaller(kForwardKeys, range.end - key);
      BiasTile<Real> bias;
      if (stage.mask_is_per_key()) {
        if (!load_bias_per_key(stage.mask_rows, key, keys, block.bias, bias)) {
          if (block.at_once) start_later(block);
          continue;
        }
      }
      const Rows<Real> key_rows =
          key_value_rows(p.key, block.batch, kv_head, key, keys, p.head_dim, few_queries, key_scratch);
      const Rows<Real> value_rows =
          key_value_rows(p.value, block.batch, kv_head, key, keys, p.value_dim, few_queries, value_scratch);
      const NextRows next(p, block.batch, kv_head, key + keys, kForwardKeys, range.end - key - keys,
                          block.panels.count);
      for (int i = 0; i < block.panels.count; ++i) {
        RowsAhead ahead;
        next.add_share(i, ahead);
        const int then = block.panels.after(i);
        const int64_t offset = block.panels.offset[then], width = block.panels.vectors[then] * kLanes<Real>;
        add_bias(stage.mask_rows, block.row + offset, smaller(width, block.rows - offset), then > 0 ? key : key + keys,
                 kForwardKeys, ahead);
        with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
          add_keys<kVectors>(block, block.panels.offset[i], stage, bias, key, keys, key_rows, value_rows, ahead);
        });
        ahead.ask_for_rest();
      }
    }
    finish(block, stage.score_factor(), scratch);
  }

  // A sink is a key that is always attended and has value 0.
  void start(const Block& block) const {
    const Real lowest = -static_cast<Real>(__builtin_inf());
    Real sink = lowest;
    if (p.sinks.defined()) sink = head_number<Real>(p.sinks, block.batch, block.head);
    fill<Real>(block.maximum, sink, block.panels.lanes);
    fill<Real>(block.sum, sink == lowest ? 0 : 1, block.panels.lanes);
    if (!block.at_once) fill<Real>(block.out, 0, block.panels.lanes * p.value_dim);
  }

  // Nothing is attended after all.
  void start_later(Block& block) const {
    block.at_once = false;
    fill<Real>(block.out, 0, block.panels.lanes * p.value_dim);
  }

  // Lets one panel, the one that starts at lane offset, attend one block of keys.
  template <int kVectors>
  TA_NOINLINE void add_keys(const Block& block, int64_t offset, const ScoreStage<Real>& stage, BiasTile<Real> bias,
                            int64_t key, int64_t keys, Rows<Real> key_rows, Rows<Real> value_rows,
                            RowsAhead& ahead) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset, rows = smaller(width, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, keys, kTileRows<kVectors>);
    if (span.empty() ||
        (stage.mask && !stage.mask_is_per_key() &&
         !load_bias_per_lane(stage.mask_rows, row, rows, width, key, span.begin, span.end, block.staging,
                             stage.takes_bias_in_place(span) ? block.scores : block.bias, bias))) {
      if (block.at_once) store_at_once(block, offset, width, 0, value_rows, nullptr);
      return;
    }
    ahead.divide((span.end - span.begin + p.value_dim) / kTileRows<kVectors>);
    const auto between = [&] { ahead.ask_for_portion(); };
    Real *maximum = block.maximum + offset, *old_maximum = block.old_maximum + offset,
         *rescale = block.rescale + offset;
    __builtin_memcpy(old_maximum, maximum, width * sizeof(Real));
    const bool in_place = block.rows <= kFewQueries && p.dtype == kStoredAs<Real>;
    if (in_place) prefetch_rows(value_rows, span.begin, span.end - span.begin, p.value_dim);
    score_tile<Real, kVectors, true>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                     key, block.scores, nullptr, maximum, between);
    const auto softmax = [&]<bool kDropout>(KeptTile<Real, kVectors> kept) TA_INLINE_LAMBDA {
      softmax_tile<Real, kVectors, kDropout>(span.begin, span.end, stage.score_factor(), block.scores, kept,
                                             old_maximum, maximum, block.sum + offset, rescale);
    };
    if (p.dropout_p > 0) {
      softmax.template operator()<true>(
          dropout_tile<Real, kVectors>(dropout, p.dropout_batch_head(block.batch, block.head), row, key + span.begin,
                                       span.end - span.begin, key, Real{1}, block.dropout));
    } else {
      softmax.template operator()<false>({});
    }
    if (block.at_once) {
      store_at_once(block, offset, width, span.end - span.begin,
                    {value_rows.data + span.begin * value_rows.stride, value_rows.stride},
                    block.scores + span.begin * width);
      return;
    }
    if (in_place) prefetch_rows(key_rows, keys, keys, p.head_dim);
    combine_rows<Real, kVectors, true>(
        p.value_dim, span.end - span.begin, value_rows.data + span.begin * value_rows.stride, value_rows.stride,
        block.scores + span.begin * width, block.out + offset * p.value_dim, rescale, between);
  }

  Real keep_scale() const { return p.dropout_p > 0 ? static_cast<Real>(Dropout::keep_scale(p.dropout_p)) : Real{1}; }

  // The output of the panel at lane offset, whose sums are complete, from the weights of so many keys.
  void store_at_once(const Block& block, int64_t offset, int64_t width, int64_t keys, Rows<Real> values,
                     const Real* weights) const {
    Real *sum = block.sum + offset, *factor = block.rescale + offset;
    for (int64_t i = 0; i < width; i += kLanes<Real>)
      store(factor + i, OnlineSoftmax<VectorMath<Real>>::inverse_sum(load(sum + i)) * keep_scale());
    store_row_product<Real>(outputs.out, block.batch, block.head, block.row + offset,
                            smaller(width, block.rows - offset), p.value_dim, keys, weights, width, values, factor,
                            block.out + offset * p.value_dim);
  }

  void finish(const Block& block, Real score_factor, Scratch& scratch) const {
    using Softmax = OnlineSoftmax<VectorMath<Real>>;
    constexpr int n_lanes = kLanes<Real>;
    for (int64_t i = 0; i < block.panels.lanes; i += n_lanes) {
      const Vec<Real> sum = load(block.sum + i);
      store(block.maximum + i, Softmax::logsumexp(load(block.maximum + i) * score_factor, sum));
      store(block.sum + i, Softmax::inverse_sum(sum) * keep_scale());
    }
    Real* logsumexp = static_cast<Real*>(outputs.logsumexp) + p.first_row(block.batch, block.head) + block.row;
    __builtin_memcpy(logsumexp, block.maximum, block.rows * sizeof(Real));
    if (block.at_once) return;
    Real* rows = scratch.take<Real>(kMaxVectors * n_lanes * round_up(p.value_dim, n_lanes));
    for (int i = 0; i < block.panels.count; ++i) {
      const int64_t offset = block.panels.offset[i], width = block.panels.vectors[i] * n_lanes;
      store_panel(outputs.out, block.batch, block.head, block.row + offset, smaller(width, block.rows - offset),
                  p.value_dim, block.out + offset * p.value_dim, width, block.sum + offset, rows);
    }
  }
};

template <class Real>
void forward_as(const AttentionProblem& problem, const ForwardOutputs& outputs, const Parallel& parallel) {
  if (problem.batch * problem.heads * problem.query_length == 0) return;
  if (suits_decoding<Real>(problem)) return decode_as<Real>(problem, outputs, parallel);
  const Forward<Real> forward(problem, outputs, parallel.threads);
  for_each_item(parallel, forward.items(), [&](int64_t item, Scratch& scratch) { forward.run(item, scratch); });
}

inline void attention_forward(const AttentionProblem& problem, const ForwardOutputs& outputs,
                              const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    forward_as<double>(problem, outputs, parallel);
  } else {
    forward_as<float>(problem, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
