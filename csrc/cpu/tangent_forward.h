// The forward pass together with its tangents (forward-mode derivatives) in one walk over the keys: with weights P
// after dropout and t(x) the tangent of x,
//   t(logsumexp) = Σ softmax · t(score),   t(out) = Σ P · (t(score) · value + t(value)) − t(logsumexp) · out.
// Both sums are gathered unnormalised beside forward's own and rescaled with them. Included by instantiate/*.cpp.
#pragma once

#include "forward.h"
#include "row_block.h"
#include "tangent_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// softmax_tile with tangents. In: scores and, unless null (zero), their tangents; out, in place: the weights after
// dropout, without its scale, and those times the tangents. dropout.words is null without dropout.
template <class Real, int kVectors>
TA_NOINLINE void tangent_softmax_tile(int64_t begin, int64_t end, Real* scores, Real* tangents,
                                      KeptTile<Real, kVectors> dropout, const Real* old_maximum, const Real* maximum,
                                      Real* sum, Real* tangent_sum, Real* rescale) {
  using Math = VectorMath<Real>;
  using Softmax = OnlineSoftmax<Math>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const Vec<Real> highest = load(maximum + n * n_lanes), subtracted = Softmax::safe_maximum(highest);
    const Vec<Real> factor = Softmax::rescale(load(old_maximum + n * n_lanes), highest);
    Vec<Real> tile_sum{}, tile_tangent_sum{};
    for (int64_t j = begin; j < end; ++j) {
      const int64_t place = j * width + n * n_lanes;
      const Vec<Real> weight = Math::exp(load(scores + place) - subtracted);
      const Vec<Real> kept = dropout.words == nullptr ? weight : kept_of(weight, dropout.at(j, n));
      tile_sum += weight;
      store(scores + place, kept);
      if (tangents == nullptr) continue;
      const Vec<Real> tangent = load(tangents + place);
      tile_tangent_sum += weighted<Real>(weight, tangent);
      store(tangents + place, weighted<Real>(kept, tangent));
    }
    store(rescale + n * n_lanes, factor);
    store(sum + n * n_lanes, load(sum + n * n_lanes) * factor + tile_sum);
    store(tangent_sum + n * n_lanes, load(tangent_sum + n * n_lanes) * factor + tile_tangent_sum);
  }
}

template <class Real>
struct TangentForward {
  const AttentionProblem& p;
  const TangentForwardOutputs& outputs;
  AttentionProblem tangents;
  TangentParts changes;
  Dropout dropout;
  int64_t block_rows, row_blocks;

  TangentForward(const AttentionProblem& problem, const Tangents& all_tangents, const TangentForwardOutputs& out,
                 int threads)
      : p(problem),
        outputs(out),
        tangents(problem_of_tangents(problem, all_tangents)),
        changes(all_tangents),
        dropout(Dropout::make(problem.dropout_p, problem.philox_seed, problem.philox_offset)),
        block_rows(query_block_rows<Real>(problem, threads)),
        row_blocks((p.query_length + block_rows - 1) / block_rows) {}

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  // The state of one block of rows while it walks over the keys.
  struct Block {
    int64_t batch, head, row, rows;
    Panels panels;
    Real *query, *tangent_query, *out, *tangent_out;            // panels: [lane offset · dim][dim][lane]
    Real *maximum, *old_maximum, *sum, *tangent_sum, *rescale;  // [lane]
    Real *scores, *score_tangents;                              // one tile
    TileScratch<Real> tile, tangent_tile;

    Block(const AttentionProblem& p, const AttentionProblem& tangents, int64_t max_rows, Scratch& scratch)
        : tile(p, scratch), tangent_tile(tangents, scratch) {
      const int64_t lanes = round_up(max_rows, kLanes<Real>), size = kForwardKeys * kMaxVectors * kLanes<Real>;
      query = scratch.take<Real>(lanes * p.head_dim);
      tangent_query = tangents.query.defined() ? scratch.take<Real>(lanes * p.head_dim) : nullptr;
      out = scratch.take<Real>(lanes * p.value_dim);
      tangent_out = scratch.take<Real>(lanes * p.value_dim);
      for (Real** array : {&maximum, &old_maximum, &sum, &tangent_sum, &rescale}) *array = scratch.take<Real>(lanes);
      scores = scratch.take<Real>(size);
      score_tangents = scratch.take<Real>(size);
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    Block block(p, tangents, block_rows, scratch);
    block.batch = item / (p.heads * row_blocks);
    block.head = item / row_blocks % p.heads;
    block.row = (row_blocks - 1 - item % row_blocks) * block_rows;  // with a causal mask, long rows first
    block.rows = smaller(block_rows, p.query_length - block.row);
    block.panels.cut(block.rows, kLanes<Real>);
    const typename TangentKeys<Real>::Memory memory(p, kForwardKeys, scratch);
    const ScoreStage<Real> stage(p, block.batch, block.head), added(tangents, block.batch, block.head);
    const int64_t kv_head = block.head / (p.heads / p.kv_heads);

    load_query(block, p.query, block.query, scratch);
    if (tangents.query.defined()) load_query(block, tangents.query, block.tangent_query, scratch);
    start(block);
    const KeyRange range = stage.band.keys_of_any(block.row, block.row + block.rows);
    for (int64_t key = range.begin; key < range.end; key += kForwardKeys) {
      const int64_t keys = smaller(kForwardKeys, range.end - key);
      const auto key_block =
          TangentKeys<Real>::read(p, tangents, block.batch, kv_head, key, keys, block.rows <= kFewQueries, memory);
      for (int i = 0; i < block.panels.count; ++i) {
        with_vectors(block.panels.vectors[i], [&]<int kVectors>() {
          add_keys<kVectors>(block, block.panels.offset[i], stage, added, key, keys, key_block);
        });
      }
    }
    finish(block, scratch);
  }

  void load_query(const Block& block, const TensorView& view, Real* panels, Scratch& scratch) const {
    Real* memory = scratch.take<Real>(block.rows * round_up(p.head_dim, kLanes<Real>));
    const Rows<Real> rows = padded_rows(view, block.batch, block.head, block.row, block.rows, p.head_dim, memory);
    for (int i = 0; i < block.panels.count; ++i) {
      const int64_t offset = block.panels.offset[i];
      pack_panel(panels + offset * p.head_dim, block.panels.vectors[i] * kLanes<Real>, rows.data + offset * rows.stride,
                 rows.stride, block.rows - offset, p.head_dim);
    }
  }

  // A sink is a key that is always attended and has value 0.
  void start(const Block& block) const {
    const Real lowest = -static_cast<Real>(__builtin_inf());
    Real sink = lowest, tangent_sink = 0;
    if (p.sinks.defined()) sink = head_number<Real>(p.sinks, block.batch, block.head);
    if (sink != lowest && tangents.sinks.defined()) {
      tangent_sink = head_number<Real>(tangents.sinks, block.batch, block.head);
    }
    fill<Real>(block.maximum, sink, block.panels.lanes);
    fill<Real>(block.sum, sink == lowest ? 0 : 1, block.panels.lanes);
    fill<Real>(block.tangent_sum, tangent_sink, block.panels.lanes);
    fill<Real>(block.out, 0, block.panels.lanes * p.value_dim);
    fill<Real>(block.tangent_out, 0, block.panels.lanes * p.value_dim);
  }

  // Lets one panel, the one that starts at lane offset, attend one block of keys.
  template <int kVectors>
  TA_NOINLINE void add_keys(const Block& block, int64_t offset, const ScoreStage<Real>& stage,
                            const ScoreStage<Real>& added, int64_t key, int64_t keys,
                            const TangentKeys<Real>& key_block) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset, rows = smaller(width, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, block.tile, row, rows, key, span, bias)) return;
    Real *maximum = block.maximum + offset, *old_maximum = block.old_maximum + offset,
         *rescale = block.rescale + offset;
    __builtin_memcpy(old_maximum, maximum, width * sizeof(Real));
    const Real* query = block.query + offset * p.head_dim;
    capped_score_tile<Real, kVectors, true>(stage, bias, span, p.head_dim, key_block.key, query, row, key, block.scores,
                                            block.tile.derivative, maximum);
    if (changes.scores) {
      const Real* tangent_query = block.tangent_query == nullptr ? nullptr : block.tangent_query + offset * p.head_dim;
      dot_sums<Real, kVectors>(span, p.head_dim, {{key_block.tangent_key, query}, {key_block.key, tangent_query}},
                               stage.dot_factor(), block.score_tangents);
      BiasTile<Real> tangent_bias;
      load_bias<Real, kVectors>(added, block.tangent_tile, row, rows, key, span, tangent_bias);
      if (stage.softcap || added.changes_elements(tangent_bias)) {
        tangent_scores<Real, kVectors>(stage, added, tangent_bias, row, key, span.begin, span.end, block.score_tangents,
                                       block.tile.derivative, nullptr);
      }
    }
    const auto kept =
        kept_tile<Real, kVectors>(p, dropout, block.batch, block.head, row, key, span, block.tile.dropout);
    tangent_softmax_tile<Real, kVectors>(span.begin, span.end, block.scores,
                                         changes.scores ? block.score_tangents : nullptr, kept, old_maximum, maximum,
                                         block.sum + offset, block.tangent_sum + offset, rescale);
    combine<kVectors, true>(key_block.value, span, block.scores, block.out + offset * p.value_dim, rescale);
    Real* tangent_out = block.tangent_out + offset * p.value_dim;
    if (changes.scores) combine<kVectors, true>(key_block.value, span, block.score_tangents, tangent_out, rescale);
    if (key_block.tangent_value.data == nullptr) return;
    if (changes.scores) {
      combine<kVectors, false>(key_block.tangent_value, span, block.scores, tangent_out, nullptr);
    } else {
      combine<kVectors, true>(key_block.tangent_value, span, block.scores, tangent_out, rescale);
    }
  }

  template <int kVectors, bool kRescale>
  TA_INLINE void combine(Rows<Real> values, const KeySpan& span, const Real* weights, Real* out,
                         const Real* rescale) const {
    combine_rows<Real, kVectors, kRescale>(p.value_dim, span.end - span.begin, values.data + span.begin * values.stride,
                                           values.stride, weights + span.begin * kVectors * kLanes<Real>, out, rescale);
  }

  void finish(const Block& block, Scratch& scratch) const {
    using Softmax = OnlineSoftmax<VectorMath<Real>>;
    constexpr int n_lanes = kLanes<Real>;
    const Real keep_scale = p.dropout_p > 0 ? static_cast<Real>(Dropout::keep_scale(p.dropout_p)) : Real{1};
    Real* rows = scratch.take<Real>(kMaxVectors * n_lanes * round_up(p.value_dim, n_lanes));
    for (int64_t i = 0; i < block.panels.lanes; i += n_lanes) {
      const Vec<Real> sum = load(block.sum + i), inverse = Softmax::inverse_sum(sum);
      store(block.maximum + i, Softmax::logsumexp(load(block.maximum + i), sum));
      store(block.sum + i, inverse * keep_scale);
      store(block.tangent_sum + i, load(block.tangent_sum + i) * inverse);
    }
    const int64_t first = p.first_row(block.batch, block.head) + block.row;
    __builtin_memcpy(static_cast<Real*>(outputs.logsumexp) + first, block.maximum, block.rows * sizeof(Real));
    __builtin_memcpy(static_cast<Real*>(outputs.tangent_logsumexp) + first, block.tangent_sum,
                     block.rows * sizeof(Real));
    for (int i = 0; i < block.panels.count; ++i) {
      const int64_t offset = block.panels.offset[i], width = block.panels.vectors[i] * n_lanes;
      Real *out = block.out + offset * p.value_dim, *tangent_out = block.tangent_out + offset * p.value_dim;
      for (int64_t j = 0; j < p.value_dim * width; j += n_lanes) {
        store(tangent_out + j, load(tangent_out + j) - load(block.tangent_sum + offset + j % width) * load(out + j));
      }
      const auto write = [&](const TensorView& view, const Real* panel) {
        store_panel(view, block.batch, block.head, block.row + offset, smaller(width, block.rows - offset), p.value_dim,
                    panel, width, block.sum + offset, rows);
      };
      write(outputs.out, out);
      write(outputs.tangent_out, tangent_out);
    }
  }
};

template <class Real>
void tangent_forward_as(const AttentionProblem& problem, const Tangents& tangents, const TangentForwardOutputs& outputs,
                        const Parallel& parallel) {
  if (problem.batch * problem.heads * problem.query_length == 0) return;
  const TangentForward<Real> forward(problem, tangents, outputs, parallel.threads);
  for_each_item(parallel, forward.items(), [&](int64_t item, Scratch& scratch) { forward.run(item, scratch); });
}

inline void attention_tangent_forward(const AttentionProblem& problem, const Tangents& tangents,
                                      const TangentForwardOutputs& outputs, const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    tangent_forward_as<double>(problem, tangents, outputs, parallel);
  } else {
    tangent_forward_as<float>(problem, tangents, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
