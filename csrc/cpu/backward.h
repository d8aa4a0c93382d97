// The backward pass (Dao et al. 2022, alg. 4): blocks of query rows walk over the keys, recompute the weights, and add to
// the gradients of query, key and value. Included by instantiate/*.cpp.
#pragma once

#include "gradient_tile.h"
#include "kernel_table.h"
#include "mask_gradient.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kBackwardRows = 96;

// A task is one (batch, key/value head) and a chunk of the query rows (of all heads in its group) that read it. Where one
// chunk per key/value head leaves threads idle, there are more, each with its own sums, which are added up in order at the
// end: no atomics, and the same result on every run with the same number of threads.
template <class Real>
struct Backward {
  using Wanted = typename GradientTile<Real>::Wanted;
  const AttentionProblem& p;
  const BackwardTensors& t;
  int64_t group, block_rows, row_blocks, chunks;
  int64_t key_columns, value_columns;  // row lengths of the sums: whole vectors
  bool needs_query, needs_key, needs_value, needs_slopes, needs_scores;
  Real* chunk_sums = nullptr;      // [batch · kv head][chunk][sums] if chunks > 1
  Real* slope_partials = nullptr;  // [batch · head][row block]

  Backward(const AttentionProblem& problem, const BackwardTensors& tensors, int threads) : p(problem), t(tensors) {
    group = p.heads / p.kv_heads;
    block_rows = balanced_block<Real>(p.query_length, kBackwardRows);
    row_blocks = (p.query_length + block_rows - 1) / block_rows;
    needs_query = t.grad_query.defined();
    needs_key = t.grad_key.defined();
    needs_value = t.grad_value.defined();
    needs_slopes = t.grad_alibi_slopes != nullptr;
    needs_scores = needs_query || needs_key || needs_slopes;
    key_columns = needs_key ? round_up(p.head_dim, kLanes<Real>) : 0;
    value_columns = needs_value ? round_up(p.value_dim, kLanes<Real>) : 0;
    chunks = chunks_for(threads);
  }

  // The fewest chunks that keep the threads at least 90 % busy, or else those that keep them busiest.
  int64_t chunks_for(int64_t threads) const {
    const int64_t heads = p.batch * p.kv_heads, most = smaller(group * row_blocks, 4 * threads);
    int64_t best = 1;
    double best_share = 0;
    for (int64_t n = 1; n <= most; ++n) {
      const int64_t tasks = heads * n, rounds = (tasks + threads - 1) / threads;
      const double share = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
      if (share > best_share) best = n, best_share = share;
      if (share >= 0.9) break;
    }
    return best;
  }

  int64_t items() const { return p.batch * p.kv_heads * chunks; }
  int64_t sums_size() const { return p.key_length * (key_columns + value_columns); }

  void run(int64_t item, Scratch& scratch) const {
    const int64_t chunk = item % chunks, kv_head = item / chunks % p.kv_heads, batch = item / chunks / p.kv_heads;
    Real* key_sums = chunk_sums == nullptr ? scratch.take<Real>(sums_size()) : chunk_sums + item * sums_size();
    fill<Real>(key_sums, 0, sums_size());

    RowBlock<Real> block(p, block_rows, scratch);
    Walk walk(*this, batch, kv_head, key_sums, scratch);
    const BandMask band = band_mask(p, batch);
    const auto cost = [&](int64_t index) {  // of a row block
      const int64_t row = index % row_blocks * block_rows;
      const KeyRange range = band.keys_of_any(row, smaller(row + block_rows, p.query_length));
      return 1 + (range.empty() ? 0 : range.end - range.begin);
    };
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < row_blocks; ++i) total += cost(i) * group;
    for (int64_t i = 0; i < group * row_blocks; ++i) {
      if (before * chunks / total == chunk) {
        const int64_t head = kv_head * group + i / row_blocks, row = i % row_blocks * block_rows;
        block.read(p, t, batch, head, row, smaller(block_rows, p.query_length - row));
        const Real slope_gradient = walk.over_keys(block);
        if (needs_slopes) slope_partials[(batch * p.heads + head) * row_blocks + i % row_blocks] = slope_gradient;
      }
      before += cost(i);
    }
    if (chunks == 1) store_sums(batch, kv_head, key_sums, 0, p.key_length);
  }

  // Writes keys [begin, end) of one (batch, key/value head)'s sums out.
  void store_sums(int64_t batch, int64_t kv_head, const Real* sums, int64_t begin, int64_t end) const {
    if (needs_key) {
      store_rows(t.grad_key, element(t.grad_key, batch, kv_head, begin), sums + begin * key_columns, key_columns,
                 end - begin, p.head_dim);
    }
    if (needs_value) {
      store_rows(t.grad_value, element(t.grad_value, batch, kv_head, begin),
                 sums + p.key_length * key_columns + begin * value_columns, value_columns, end - begin, p.value_dim);
    }
  }

  static constexpr int64_t kReducedKeys = 64;
  int64_t reductions() const { return p.batch * p.kv_heads * ((p.key_length + kReducedKeys - 1) / kReducedKeys); }

  // Adds up the chunks' sums for one block of keys, into the first chunk's, and writes them out.
  void reduce(int64_t item) const {
    const int64_t key_blocks = (p.key_length + kReducedKeys - 1) / kReducedKeys;
    const int64_t kv_index = item / key_blocks, begin = item % key_blocks * kReducedKeys;
    const int64_t end = smaller(begin + kReducedKeys, p.key_length);
    Real* sums = chunk_sums + kv_index * chunks * sums_size();
    const auto add_up = [&](int64_t first, int64_t last) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const Real* added = sums + chunk * sums_size();
        for (int64_t i = first; i < last; i += kLanes<Real>) store(sums + i, load(sums + i) + load(added + i));
      }
    };
    add_up(begin * key_columns, end * key_columns);
    const int64_t values = p.key_length * key_columns;
    add_up(values + begin * value_columns, values + end * value_columns);
    store_sums(kv_index / p.kv_heads, kv_index % p.kv_heads, sums, begin, end);
  }

  void sum_slopes() const {
    for (int64_t i = 0; i < p.batch * p.heads; ++i) {
      Real sum = 0;
      for (int64_t j = 0; j < row_blocks; ++j) sum += slope_partials[i * row_blocks + j];
      static_cast<Real*>(t.grad_alibi_slopes)[i] = sum;
    }
  }

  // One task's memory, and its walk over the keys with one block of rows after the other.
  struct Walk {
    const Backward& b;
    const AttentionProblem& p;
    int64_t batch, kv_head;
    Real *key_sums, *value_sums;
    GradientTile<Real> tile;
    Real *weights, *gradients;  // panels: [lane offset · kBackwardKeys][key][lane]
    Real *grad_query, *grad_query_rows, *ones;
    Real *key_scratch, *value_scratch;

    Walk(const Backward& backward, int64_t batch_index, int64_t kv_head_index, Real* sums, Scratch& scratch)
        : b(backward),
          p(backward.p),
          batch(batch_index),
          kv_head(kv_head_index),
          key_sums(sums),
          value_sums(sums + p.key_length * b.key_columns),
          tile(p, scratch) {
      const int64_t lanes = b.block_rows;
      weights = scratch.take<Real>(lanes * kBackwardKeys);
      gradients = scratch.take<Real>(lanes * kBackwardKeys);
      grad_query = scratch.take<Real>(lanes * p.head_dim);
      grad_query_rows = scratch.take<Real>(kMaxVectors * kLanes<Real> * round_up(p.head_dim, kLanes<Real>));
      ones = scratch.take<Real>(kMaxVectors * kLanes<Real>);
      fill<Real>(ones, 1, kMaxVectors * kLanes<Real>);
      key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
      value_scratch = scratch.take<Real>(kBackwardKeys * p.value_dim);
    }

    // Returns the block's share of the ALiBi slope's gradient.
    Real over_keys(RowBlock<Real>& block) {
      const ScoreStage<Real> stage(p, batch, block.head);
      block.normalise_weights(p, stage, tile.scratch, weights, key_scratch);
      if (b.needs_query) fill<Real>(grad_query, 0, block.panels.lanes * p.head_dim);
      Real slope_gradient = 0;
      const bool few_queries = block.rows <= kFewRows;
      const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
      for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
        const int64_t keys = smaller(kBackwardKeys, range.end - key);
        const Rows<Real> key_rows =
            key_value_rows(p.key, batch, kv_head, key, keys, p.head_dim, few_queries, key_scratch);
        const Rows<Real> value_rows =
            key_value_rows(p.value, batch, kv_head, key, keys, p.value_dim, few_queries, value_scratch);
        int64_t begin[Panels::kMax], end[Panels::kMax];
        for (int i = 0; i < block.panels.count; ++i) {
          with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
            const KeySpan span = attend<kVectors>(block, stage, block.panels.offset[i], key, keys, key_rows, value_rows,
                                                  slope_gradient);
            begin[i] = span.begin, end[i] = span.end;
          });
        }
        if (b.needs_value) {
          accumulate_gradient<Real>(block.panels, begin, end, keys, b.value_columns, {weights, kBackwardKeys}, block.rows,
                                    block.grad_rows.data, block.grad_rows.stride, value_sums + key * b.value_columns,
                                    b.value_columns);
        }
        if (b.needs_key) {
          accumulate_gradient<Real>(block.panels, begin, end, keys, b.key_columns, {gradients, kBackwardKeys}, block.rows,
                                    block.query_rows.data, block.query_rows.stride, key_sums + key * b.key_columns, b.key_columns);
        }
      }
      if (b.needs_query) store_grad_query(block);
      return slope_gradient;
    }

    // One panel's weights and gradients with one block of keys, and its grad_query. Returns the keys that it filled in.
    template <int kVectors>
    TA_NOINLINE KeySpan attend(const RowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                               int64_t keys, Rows<Real> key_rows, Rows<Real> value_rows, Real& slope_gradient) {
      constexpr int64_t width = kVectors * kLanes<Real>;
      Real *panel_weights = weights + offset * kBackwardKeys, *panel_gradients = gradients + offset * kBackwardKeys;
      const KeySpan span = KeySpan::of(stage.band, block.row + offset, smaller(width, block.rows - offset), key, keys,
                                       kGradientRows);
      if (span.empty()) return span;
      const Wanted wanted = b.needs_scores ? Wanted::kDotGradients : Wanted::kWeightsOnly;
      if (!tile.template compute<kVectors>(block, stage, offset, key, span, key_rows, value_rows, wanted, panel_weights,
                                           panel_gradients, b.needs_slopes ? &slope_gradient : nullptr)) {
        fill<Real>(panel_weights + span.begin * width, 0, (span.end - span.begin) * width);
        fill<Real>(panel_gradients + span.begin * width, 0, (span.end - span.begin) * width);
        return span;
      }
      if (b.needs_query) {
        combine_rows<Real, kVectors, false>(p.head_dim, span.end - span.begin,
                                            key_rows.data + span.begin * key_rows.stride, key_rows.stride,
                                            panel_gradients + span.begin * width, grad_query + offset * p.head_dim, nullptr);
      }
      return span;
    }

    void store_grad_query(const RowBlock<Real>& block) {
      for (int i = 0; i < block.panels.count; ++i) {
        const int64_t offset = block.panels.offset[i], width = block.panels.vectors[i] * kLanes<Real>;
        store_panel(b.t.grad_query, batch, block.head, block.row + offset, smaller(width, block.rows - offset), p.head_dim,
                    grad_query + offset * p.head_dim, width, ones, grad_query_rows);
      }
    }
  };
};

template <class Real>
void backward_as(const AttentionProblem& problem, const BackwardTensors& tensors, const Parallel& parallel) {
  if (tensors.grad_attn_mask.defined()) mask_gradient<Real>(problem, tensors, parallel);
  if (problem.batch * problem.kv_heads == 0) return;
  Backward<Real> backward(problem, tensors, parallel.threads < 1 ? 1 : parallel.threads);
  if (!backward.needs_scores && !backward.needs_value) return;
  Scratch shared;
  if (backward.chunks > 1) backward.chunk_sums = shared.take<Real>(backward.items() * backward.sums_size());
  if (backward.needs_slopes) {
    backward.slope_partials = shared.take<Real>(problem.batch * problem.heads * backward.row_blocks);
  }
  for_each_item(parallel, backward.items(), [&](int64_t item, Scratch& scratch) { backward.run(item, scratch); });
  if (backward.chunks > 1) {
    for_each_item(parallel, backward.reductions(), [&](int64_t item, Scratch&) { backward.reduce(item); });
  }
  if (backward.needs_slopes) backward.sum_slopes();
}

inline void attention_backward(const AttentionProblem& problem, const BackwardTensors& tensors, const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    backward_as<double>(problem, tensors, parallel);
  } else {
    backward_as<float>(problem, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
