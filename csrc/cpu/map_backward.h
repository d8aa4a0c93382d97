// The backward pass of attention_weights and attention_statistics: attention's own, with another gradient of the
// weights. What a caller cannot know of a row, the sum of its weights times the dense part of that gradient, comes from
// a pass before. Included by instantiate/map_*.cpp.
#pragma once

#include "../core/map_statistics.h"
#include "backward_tasks.h"
#include "map_kernels.h"
#include "weight_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Numbers of (B, Hq, L), or nothing, for a panel of rows, as vectors.
template <class Real>
TA_INLINE Vec<Real> load_lanes(const void* numbers, int64_t first, int64_t count) {
  Vec<Real> lanes{};
  if (numbers == nullptr) return lanes;
  for (int i = 0; i < kLanes<Real> && i < count; ++i) lanes[i] = static_cast<const Real*>(numbers)[first + i];
  return lanes;
}

// d loss / d P for one panel with one block of keys, term by term (see MapBackwardTensors).
template <class Real>
struct WeightGradients {
  const AttentionProblem& p;
  const MapBackwardTensors& t;
  Real *staging = nullptr, *dense = nullptr;

  WeightGradients(const AttentionProblem& problem, const MapBackwardTensors& tensors, Scratch& scratch)
      : p(problem), t(tensors) {
    if (!t.weights.defined()) return;
    constexpr int64_t size = kBackwardKeys * kMaxVectors * kLanes<Real>;
    staging = scratch.take<Real>(size);
    dense = scratch.take<Real>(size);
  }

  TA_INLINE int64_t first_row(const RowBlock<Real>& block, int64_t offset) const {
    return (block.batch * p.heads + block.head) * p.query_length + block.row + offset;
  }

  // out[key][lane] of the terms whose sums over the row the caller knows. scores are the final ones.
  template <int kVectors>
  TA_NOINLINE void known(const RowBlock<Real>& block, const BandMask& band, int64_t offset, int64_t key,
                         const KeySpan& span, const Real* scores, Real* out) const {
    using Math = VectorMath<Real>;
    constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
    const bool smooth = t.entropy != nullptr || t.mean_distance != nullptr || t.window_mass != nullptr;
    if (!smooth) fill<Real>(out + span.begin * width, 0, (span.end - span.begin) * width);
    for (int n = 0; smooth && n < kVectors; ++n) {
      const int64_t lane = offset + n * n_lanes, first = first_row(block, lane), count = block.rows - lane;
      const RowGradients<Math> gradients{load_lanes<Real>(t.entropy, first, count),
                                         load_lanes<Real>(t.mean_distance, first, count),
                                         load_lanes<Real>(t.window_mass, first, count)};
      Vec<Real> log_scale{}, position{};
      if (block.weight_scale != nullptr) log_scale = Math::log(load(block.weight_scale + lane));
      const Vec<Real> logsumexp = load(block.logsumexp + lane);
      for (int i = 0; i < n_lanes; ++i) position[i] = static_cast<Real>(band.position(block.row + lane + i) - key);
      for (int64_t j = span.begin; j < span.end; ++j) {
        const int64_t place = j * width + n * n_lanes;
        const Vec<Real> distance = Math::abs(splat(static_cast<Real>(j)) - position);
        const Vec<Real> log_weight = load(scores + place) - logsumexp + log_scale;
        store(out + place, gradients.at(log_weight, distance, splat(static_cast<Real>(t.mass_window))));
      }
    }
    for (int64_t i = 0; t.chosen > 0 && i < width && offset + i < block.rows; ++i) {
      const int64_t first = (first_row(block, offset + i)) * t.chosen;
      for (int64_t c = 0; c < t.chosen; ++c) {
        const int64_t j = t.chosen_keys[first + c] - key;
        if (j >= span.begin && j < span.end)
          out[j * width + i] += static_cast<const Real*>(t.chosen_weights)[first + c];
      }
    }
  }

  TA_INLINE bool has_unknown() const { return t.column_sum != nullptr || t.weights.defined(); }

  // Adds the others to out.
  template <int kVectors>
  TA_NOINLINE void add_unknown(const RowBlock<Real>& block, int64_t offset, int64_t key, const KeySpan& span,
                               Real* out) const {
    constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
    if (t.column_sum != nullptr) {
      const Real* columns =
          static_cast<const Real*>(t.column_sum) + (block.batch * p.heads + block.head) * p.key_length + key;
      for (int64_t j = span.begin; j < span.end; ++j) {
        for (int i = 0; i < width; i += n_lanes) {
          Real* place = out + j * width + i;
          store(place, load(place) + splat(columns[j]));
        }
      }
    }
    if (!t.weights.defined()) return;
    const int64_t keys = span.end - span.begin, stride = round_up(keys, n_lanes);
    const int64_t rows = smaller<int64_t>(width, block.rows - offset);
    const int64_t size = element_size(t.weights.dtype);
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = element(t.weights, block.batch, block.head, block.row + offset + i);
      load_row(staging + i * stride, t.weights.dtype, row + (key + span.begin) * size, 1, keys);
      for (int64_t j = keys; j < stride; ++j) staging[i * stride + j] = 0;
    }
    pack_panel(dense, width, staging, stride, rows, keys);
    const Real factor = static_cast<Real>(t.weights_factor);
    for (int64_t i = 0; i < keys * width; i += n_lanes) {
      Real* place = out + span.begin * width + i;
      store(place, load(place) + load(dense + i) * factor);
    }
  }
};

// GradientTile with these gradients of the weights in the place of grad_out·value.
template <class RealType>
struct MapGradientTile : GradientTile<RealType> {
  using Real = RealType;
  using Tensors = MapBackwardTensors;
  using Wanted = typename GradientTile<Real>::Wanted;
  static constexpr bool kTakesRawDots = false;  // some of the gradients depend on the scores themselves

  WeightGradients<Real> source;

  MapGradientTile(const AttentionProblem& problem, const MapBackwardTensors& tensors, Scratch& memory)
      : GradientTile<Real>(problem, tensors, memory), source(problem, tensors, memory) {}

  template <int kVectors>
  TA_INLINE bool compute(const RowBlock<Real>& block, const ScoreStage<Real>& stage, int64_t offset, int64_t key,
                         const KeySpan& span, Rows<Real> key_rows, Rows<Real>, Wanted wanted, Real* weights,
                         Real* gradients, Real* slope_gradient) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const AttentionProblem& p = this->p;
    const int64_t row = block.row + offset;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, this->scratch, row, smaller(width, block.rows - offset), key, span, bias))
      return false;
    score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                      key, weights, this->scratch.derivative, nullptr);
    source.template known<kVectors>(block, stage.band, offset, key, span, weights, gradients);
    if (source.has_unknown()) source.template add_unknown<kVectors>(block, offset, key, span, gradients);
    this->template finish<kVectors>(block, stage, offset, key, span, 1, wanted, weights, gradients, slope_gradient);
    return true;
  }
};

// Subtracts from each row's term what only a pass over its keys can tell. A task is one panel of rows.
template <class Real>
struct RowTerms {
  static constexpr int64_t kRows = kMaxVectors * kLanes<Real>;

  const AttentionProblem& p;
  const MapBackwardTensors& t;
  int64_t row_blocks;

  RowTerms(const AttentionProblem& problem, const MapBackwardTensors& tensors)
      : p(problem), t(tensors), row_blocks((p.query_length + kRows - 1) / kRows) {}

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  struct Memory {
    RowBlock<Real> block;
    WeightTile<Real> tile;
    WeightGradients<Real> source;
    Real *weights, *gradients, *sums, *key_scratch;

    Memory(const AttentionProblem& p, const MapBackwardTensors& t, Scratch& scratch)
        : block(p, kRows, scratch), tile(p, scratch), source(p, t, scratch) {
      weights = scratch.take<Real>(kBackwardKeys * kRows);
      gradients = scratch.take<Real>(kBackwardKeys * kRows);
      sums = scratch.take<Real>(kRows);
      key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t batch = item / (p.heads * row_blocks), head = item / row_blocks % p.heads;
    const int64_t row = (row_blocks - 1 - item % row_blocks) * kRows, rows = smaller(kRows, p.query_length - row);
    const ScoreStage<Real> stage(p, batch, head);
    const KeyRange range = stage.band.keys_of_any(row, row + rows);
    if (range.empty()) return;
    Memory memory(p, t, scratch);
    RowBlock<Real>& block = memory.block;
    block.read(p, t, batch, head, row, rows);
    block.normalise_weights(p, stage, memory.tile.scratch, memory.weights, memory.key_scratch);
    fill<Real>(memory.sums, 0, kRows);
    for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, range.end - key);
      const Rows<Real> key_rows = key_rows_of(p, block, key, keys, memory.key_scratch);
      with_vectors(block.panels.vectors[0], [&]<int kVectors>() { add<kVectors>(memory, stage, key, keys, key_rows); });
    }
    Real* terms = static_cast<Real*>(t.row_terms) + (batch * p.heads + head) * p.query_length + row;
    for (int64_t i = 0; i < rows; ++i) terms[i] -= memory.sums[i];
  }

  template <int kVectors>
  TA_NOINLINE void add(const Memory& memory, const ScoreStage<Real>& stage, int64_t key, int64_t keys,
                       Rows<Real> key_rows) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const RowBlock<Real>& block = memory.block;
    const KeySpan span = KeySpan::of(stage.band, block.row, block.rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    if (!memory.tile.template compute<kVectors>(block, stage, 0, key, span, key_rows, memory.weights)) return;
    fill<Real>(memory.gradients + span.begin * width, 0, (span.end - span.begin) * width);
    memory.source.template add_unknown<kVectors>(block, 0, key, span, memory.gradients);
    for (int64_t i = 0; i < width; i += kLanes<Real>) {
      Vec<Real> sum{};
      for (int64_t j = span.begin; j < span.end; ++j)
        sum += load(memory.weights + j * width + i) * load(memory.gradients + j * width + i);
      store(memory.sums + i, load(memory.sums + i) + sum);
    }
  }
};

template <class Real>
void map_backward_as(const AttentionProblem& problem, const MapBackwardTensors& tensors, const Parallel& parallel) {
  if (tensors.column_sum != nullptr || tensors.weights.defined()) {
    const RowTerms<Real> terms(problem, tensors);
    for_each_item(parallel, terms.items(), [&](int64_t item, Scratch& scratch) { terms.run(item, scratch); });
  }
  backward_as<MapGradientTile<Real>>(problem, tensors, parallel);
}

inline void attention_map_backward(const AttentionProblem& problem, const MapBackwardTensors& tensors,
                                   const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    map_backward_as<double>(problem, tensors, parallel);
  } else {
    map_backward_as<float>(problem, tensors, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
