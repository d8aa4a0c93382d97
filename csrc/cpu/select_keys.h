// Hard attention's forward pass: one walk over the keys, as in forward.h, that gathers the softmax's sum and entropy
// and keeps the keys that lead in each row. core/selection.h says how they are drawn. Included by
// instantiate/selection.h.
#pragma once

#include "choice_tile.h"
#include "query_block.h"
#include "score_tile.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kSelectKeys = 64;        // keys per block; blocks start at multiples of this, whatever rows they meet
constexpr int64_t kFewSelectQueries = 16;  // see key_value_rows

template <class Real>
struct SelectKeys {
  const AttentionProblem& p;
  const Selection& selection;
  const SelectionOutputs& outputs;
  SelectionNoise noise;
  int64_t block_rows, row_blocks;

  SelectKeys(const AttentionProblem& problem, const Selection& chosen, const SelectionOutputs& out, int threads)
      : p(problem),
        selection(chosen),
        outputs(out),
        noise{problem.philox_seed, problem.philox_offset},
        block_rows(query_block_rows<Real>(problem, threads)),
        row_blocks((p.query_length + block_rows - 1) / block_rows) {}

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  // The state of one block of rows while it walks over the keys.
  struct Block {
    int64_t batch, head, row, rows;
    Panels panels;
    Real* query;                                                 // panels: [lane offset · dim][dim][lane]
    Real *maximum, *old_maximum, *sum, *weighted_sum, *rescale;  // [lane]
    Leaders<Real> leaders;
    Real *scores, *weights, *bias, *staging;  // one tile
    int64_t batch_head;                       // for the noise
  };

  void run(int64_t item, Scratch& scratch) const {
    Block block;
    block.batch = item / (p.heads * row_blocks);
    block.head = item / row_blocks % p.heads;
    block.row = (row_blocks - 1 - item % row_blocks) * block_rows;  // with a causal mask, long rows first
    block.rows = smaller(block_rows, p.query_length - block.row);
    block.panels.cut(block.rows, kLanes<Real>);
    block.batch_head = p.dropout_batch_head(block.batch, block.head);
    const int64_t lanes = block.panels.lanes;
    const ScoreStage<Real> stage(p, block.batch, block.head);
    constexpr int64_t tile = kSelectKeys * kMaxVectors * kLanes<Real>;

    block.query = load_query_panels<Real>(p, block.batch, block.head, block.row, block.rows, block.panels, scratch);
    for (Real** array : {&block.maximum, &block.old_maximum, &block.sum, &block.weighted_sum, &block.rescale})
      *array = scratch.take<Real>(lanes);
    block.scores = scratch.take<Real>(tile);
    block.weights = scratch.take<Real>(tile);
    block.bias = scratch.take<Real>(stage.mask ? tile : 0);
    block.staging = scratch.take<Real>(stage.mask ? tile : 0);
    Real* key_scratch = scratch.take<Real>(kSelectKeys * p.head_dim);
    block.leaders = Leaders<Real>(selection, lanes, scratch);

    start(block);
    const bool few_queries = block.rows <= kFewSelectQueries;
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    for (int64_t key = round_down(range.begin, kSelectKeys); key < range.end; key += kSelectKeys) {
      const int64_t keys = smaller(kSelectKeys, range.end - key);
      BiasTile<Real> bias;
      if (stage.mask_is_per_key()) {
        if (!load_bias_per_key(stage.mask_rows, key, keys, block.bias, bias)) continue;
      }
      const Rows<Real> key_rows = key_value_rows(p.key, block.batch, block.head / (p.heads / p.kv_heads), key, keys,
                                                 p.head_dim, few_queries, key_scratch);
      for (int i = 0; i < block.panels.count; ++i) {
        with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
          add_keys<kVectors>(block, block.panels.offset[i], stage, bias, key, keys, key_rows);
        });
      }
    }
    finish(block);
  }

  // A sink is in the sums from the start, and joins the leaders at the end.
  void start(const Block& block) const {
    const Real lowest = -static_cast<Real>(__builtin_inf()), sink = sink_of(block);
    fill<Real>(block.maximum, sink, block.panels.lanes);
    fill<Real>(block.sum, sink == lowest ? 0 : 1, block.panels.lanes);
    fill<Real>(block.weighted_sum, 0, block.panels.lanes);
  }
  Real sink_of(const Block& block) const {
    return p.sinks.defined() ? head_number<Real>(p.sinks, block.batch, block.head)
                             : -static_cast<Real>(__builtin_inf());
  }

  // Shows one panel, the one that starts at lane offset, one block of keys.
  template <int kVectors>
  TA_NOINLINE void add_keys(const Block& block, int64_t offset, const ScoreStage<Real>& stage, BiasTile<Real> bias,
                            int64_t key, int64_t keys, Rows<Real> key_rows) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset, rows = smaller(width, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    if (stage.mask && !stage.mask_is_per_key() &&
        !load_bias_per_lane(stage.mask_rows, row, rows, width, key, span.begin, span.end, block.staging, block.bias,
                            bias)) {
      return;
    }
    Real *maximum = block.maximum + offset, *old_maximum = block.old_maximum + offset;
    __builtin_memcpy(old_maximum, maximum, width * sizeof(Real));
    score_tile<Real, kVectors, true>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                     key, block.scores, nullptr, maximum);
    const ChoiceTile<Real> tile{span.begin,   span.end,      key,         row,     block.batch_head,
                                block.scores, block.weights, old_maximum, maximum, block.rescale + offset};
    Real group_sums[kSelectKeys / SelectionNoise::kGroupKeys * width];
    sum_weights<Real, kVectors>(tile, block.sum + offset, block.weighted_sum + offset, group_sums);
    switch (selection.rule) {
      case SelectionRule::kWithReplacement:
        return race<Real, kVectors>(tile, noise, group_sums, block.leaders.at(offset));
      case SelectionRule::kWithoutReplacement:
        return rank<Real, kVectors, true>(tile, noise, block.leaders.at(offset));
      default:
        return rank<Real, kVectors, false>(tile, noise, block.leaders.at(offset));
    }
  }

  void finish(const Block& block) const {
    using Math = VectorMath<Real>;
    constexpr int n_lanes = kLanes<Real>;
    if (p.sinks.defined()) add_sink(block);
    const int64_t first = (block.batch * p.heads + block.head) * p.query_length + block.row;
    for (int64_t i = 0; i < block.panels.lanes; i += n_lanes) {
      const Vec<Real> sum = load(block.sum + i), log_sum = Math::log(sum), maximum = load(block.maximum + i);
      const Vec<Real> logsumexp = OnlineSoftmax<Math>::logsumexp(maximum, sum);
      const Vec<Real> entropy = log_sum - load(block.weighted_sum + i) / sum;
      for (int lane = 0; lane < n_lanes && i + lane < block.rows; ++lane) {
        const bool is_empty = sum[lane] == 0;
        static_cast<Real*>(outputs.logsumexp)[first + i + lane] = logsumexp[lane];
        static_cast<Real*>(outputs.entropy)[first + i + lane] = is_empty ? 0 : entropy[lane];
        for (int64_t place = 0; place < selection.count; ++place) {
          const int64_t out = (first + i + lane) * selection.count + place;
          const int64_t index = block.leaders.index_of(place, i + lane);
          const Real score = block.leaders.score_of(place, i + lane);
          outputs.indices[out] = index;
          static_cast<Real*>(outputs.scores)[out] = score;
          static_cast<Real*>(outputs.log_prob)[out] = index < 0 ? 0 : score - maximum[lane] - log_sum[lane];
        }
      }
    }
  }

  void add_sink(const Block& block) const {
    for (int64_t i = 0; i < block.panels.lanes; i += kLanes<Real>) {
      add_candidate<Real>(selection.rule, noise, block.batch_head, block.row + i, p.key_length, splat(sink_of(block)),
                          load(block.maximum + i), block.leaders.at(i));
    }
  }
};

template <class Real>
void select_keys_as(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                    const Parallel& parallel) {
  if (problem.batch * problem.heads * problem.query_length == 0) return;
  const SelectKeys<Real> select(problem, selection, outputs, parallel.threads);
  for_each_item(parallel, select.items(), [&](int64_t item, Scratch& scratch) { select.run(item, scratch); });
}

inline void select_keys(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                        const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    select_keys_as<double>(problem, selection, outputs, parallel);
  } else {
    select_keys_as<float>(problem, selection, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
