// attention_statistics: one walk over the keys for everything a row knows of its weights, and, for the sums of columns,
// which need logsumexp, a second pass whose tasks are blocks of keys. Included by instantiate/map_*.cpp.
#pragma once

#include "../core/map_statistics.h"
#include "map_kernels.h"
#include "mask_gradient.h"
#include "query_block.h"
#include "top_keys.h"
#include "weight_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kStatisticsRows = 192;
constexpr int64_t kStatisticsKeys = 64;

// One block of rows, a number per lane.
template <class Real>
struct StatisticsLanes {
  using Index = typename VecTypes<Real>::IntElement;

  Real *maximum, *old_maximum, *sum, *score_sum, *distance_sum, *window_sum;
  Index* argmax;

  StatisticsLanes(int64_t lanes, Scratch& scratch) {
    for (Real** array : {&maximum, &old_maximum, &sum, &score_sum, &distance_sum, &window_sum})
      *array = scratch.take<Real>(lanes);
    argmax = scratch.take<Index>(lanes);
    for (Real* array : {sum, score_sum, distance_sum, window_sum}) fill<Real>(array, 0, lanes);
    fill<Real>(maximum, -static_cast<Real>(__builtin_inf()), lanes);
    for (int64_t i = 0; i < lanes; ++i) argmax[i] = -1;
  }

  TA_INLINE RowSums<VectorMath<Real>> sums(int64_t lane) const {
    return {load(sum + lane), load(score_sum + lane), load(distance_sum + lane), load(window_sum + lane)};
  }
  TA_INLINE void set(int64_t lane, const RowSums<VectorMath<Real>>& sums) const {
    store(sum + lane, sums.sum);
    store(score_sum + lane, sums.score_sum);
    store(distance_sum + lane, sums.distance_sum);
    store(window_sum + lane, sums.window_sum);
  }
};

// Adds a tile of scores [key][lane] of the panel at lane offset, whose first row is row. maximum already includes it.
template <class Real, int kVectors>
TA_NOINLINE void add_to_statistics(const BandMask& band, const StatisticsLanes<Real>& lanes, int64_t offset,
                                   int64_t row, int64_t key, int64_t begin, int64_t end, Real window,
                                   const Real* scores) {
  using Math = VectorMath<Real>;
  using Int = IntVec<Real>;
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  for (int n = 0; n < kVectors; ++n) {
    const int64_t lane = offset + n * n_lanes;
    const Vec<Real> highest = load(lanes.maximum + lane), before = load(lanes.old_maximum + lane);
    const Vec<Real> subtracted = OnlineSoftmax<Math>::safe_maximum(highest);
    Vec<Real> position{};
    for (int i = 0; i < n_lanes; ++i) position[i] = static_cast<Real>(band.position(row + n * n_lanes + i) - key);
    auto tile = RowSums<Math>::zero();
    Int found = splat_int<Real>(-1);
    for (int64_t j = end - 1; j >= begin; --j) {  // downwards: of equal scores the lowest key is found last
      const Vec<Real> score = load(scores + j * width + n * n_lanes);
      tile.add(score - subtracted, Math::abs(splat(static_cast<Real>(j)) - position), splat(window));
      found = score == highest ? splat_int<Real>(j) : found;
    }
    auto sums = lanes.sums(lane);
    sums.rescale(before, highest);
    sums.merge(tile);
    lanes.set(lane, sums);
    Int* argmax = reinterpret_cast<Int*>(lanes.argmax + lane);
    *argmax = highest > before ? found + splat_int<Real>(key) : *argmax;
  }
}

template <class Real>
struct StatisticsKernel {
  const AttentionProblem& p;
  const StatisticsOutputs& outputs;
  int64_t block_rows, row_blocks;

  StatisticsKernel(const AttentionProblem& problem, const StatisticsOutputs& out)
      : p(problem),
        outputs(out),
        block_rows(balanced_block<Real>(problem.query_length, kStatisticsRows)),
        row_blocks((p.query_length + block_rows - 1) / block_rows) {}

  int64_t items() const { return p.batch * p.heads * row_blocks; }

  struct Block {
    int64_t batch, head, row, rows;
    Panels panels;
    Real *query, *scores;  // panels [lane offset · dim][dim][lane]; one tile
    StatisticsLanes<Real> lanes;
    TopKeys<Real> top;
    TileScratch<Real> tile;
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t batch = item / (p.heads * row_blocks), head = item / row_blocks % p.heads;
    const int64_t row = (row_blocks - 1 - item % row_blocks) * block_rows;  // with a causal mask, long rows first
    const int64_t rows = smaller(block_rows, p.query_length - row);
    const Panels panels = Panels::of<Real>(rows);
    Block block{batch,
                head,
                row,
                rows,
                panels,
                load_query_panels<Real>(p, batch, head, row, rows, panels, scratch),
                scratch.take<Real>(kStatisticsKeys * kMaxVectors * kLanes<Real>),
                StatisticsLanes<Real>(panels.lanes, scratch),
                TopKeys<Real>(outputs.top_k, panels.lanes, scratch),
                TileScratch<Real>(p, scratch)};
    Real* key_scratch = scratch.take<Real>(kStatisticsKeys * p.head_dim);
    const ScoreStage<Real> stage(p, batch, head);
    const KeyRange range = stage.band.keys_of_any(row, row + rows);
    for (int64_t key = range.begin; key < range.end; key += kStatisticsKeys) {
      const int64_t keys = smaller(kStatisticsKeys, range.end - key);
      const Rows<Real> key_rows = key_value_rows(p.key, batch, head / (p.heads / p.kv_heads), key, keys, p.head_dim,
                                                 rows <= kFewRows, key_scratch);
      for (int i = 0; i < panels.count; ++i) {
        with_vectors(panels.vectors[i],
                     [&]<int kVectors>() { add_keys<kVectors>(block, panels.offset[i], stage, key, keys, key_rows); });
      }
    }
    finish(block);
  }

  template <int kVectors>
  TA_NOINLINE void add_keys(const Block& block, int64_t offset, const ScoreStage<Real>& stage, int64_t key,
                            int64_t keys, Rows<Real> key_rows) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const int64_t row = block.row + offset, rows = smaller(width, block.rows - offset);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    BiasTile<Real> bias;
    if (!load_bias<Real, kVectors>(stage, block.tile, row, rows, key, span, bias)) return;
    Real* maximum = block.lanes.maximum + offset;
    __builtin_memcpy(block.lanes.old_maximum + offset, maximum, width * sizeof(Real));
    score_tile<Real, kVectors, true>(stage, bias, span, p.head_dim, key_rows, block.query + offset * p.head_dim, row,
                                     key, block.scores, nullptr, maximum);
    add_to_statistics<Real, kVectors>(stage.band, block.lanes, offset, row, key, span.begin, span.end,
                                      static_cast<Real>(outputs.mass_window), block.scores);
    if (outputs.top_k > 0) block.top.template add<kVectors>(offset, key, span.begin, span.end, block.scores);
  }

  void finish(const Block& block) const {
    using Math = VectorMath<Real>;
    const int64_t first = (block.batch * p.heads + block.head) * p.query_length + block.row;
    Vec<Real> sink = Math::negative_infinity();
    if (p.sinks.defined()) sink = splat(head_number<Real>(p.sinks, block.batch, block.head));
    for (int64_t lane = 0; lane < block.panels.lanes; lane += kLanes<Real>) {
      const auto row = RowStatistics<Math>::of(load(block.lanes.maximum + lane), block.lanes.sums(lane), sink);
      for (int64_t i = 0; i < kLanes<Real> && lane + i < block.rows; ++i) {
        const int64_t place = first + lane + i;
        static_cast<Real*>(outputs.logsumexp)[place] = row.logsumexp[i];
        static_cast<Real*>(outputs.entropy)[place] = row.entropy[i];
        static_cast<Real*>(outputs.max_weight)[place] = row.factor[i];
        static_cast<Real*>(outputs.mean_distance)[place] = row.mean_distance[i];
        outputs.argmax[place] = block.lanes.argmax[lane + i];
        if (outputs.window_mass != nullptr) static_cast<Real*>(outputs.window_mass)[place] = row.window_mass[i];
        write_top(block.top, lane + i, place, block.lanes.maximum[lane + i], row.factor[i]);
      }
    }
  }

  void write_top(const TopKeys<Real>& top, int64_t lane, int64_t place, Real maximum, Real factor) const {
    for (int64_t i = 0; i < top.count; ++i) {
      const int64_t key = top.keys[lane * top.count + i];
      const Vec<Real> score = splat(top.scores[lane * top.count + i] - maximum);
      static_cast<Real*>(outputs.top_weights)[place * top.count + i] =
          key < 0 ? Real{0} : VectorMath<Real>::exp(score)[0] * factor;
      outputs.top_indices[place * top.count + i] = key;
    }
  }
};

// The weights in the place of MaskGradient's score gradients: the gradient of a mask broadcast over rows is then the
// sum of each column.
template <class RealType>
struct ColumnWeights {
  using Real = RealType;
  using Block = RowBlock<Real>;
  using Tensors = BackwardTensors;

  const AttentionProblem& p;
  WeightTile<Real> tile;
  Real *weights, *key_scratch;
  Rows<Real> key_rows{};

  ColumnWeights(const AttentionProblem& problem, const BackwardTensors&, Scratch& scratch)
      : p(problem), tile(p, scratch) {
    weights = scratch.take<Real>(kBackwardKeys * kMaxVectors * kLanes<Real>);
    key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
  }

  void start(Block& block, const ScoreStage<Real>& stage) const {
    block.normalise_weights(p, stage, tile.scratch, weights, key_scratch);
  }
  void load_keys(const Block& block, int64_t key, int64_t keys) {
    key_rows = key_rows_of(p, block, key, keys, key_scratch);
  }
  template <int kVectors>
  TA_INLINE const Real* score_gradients(const Block& block, const ScoreStage<Real>& stage, int64_t key,
                                        const KeySpan& span) const {
    return tile.template compute<kVectors>(block, stage, 0, key, span, key_rows, weights) ? weights : nullptr;
  }
};

template <class Real>
void statistics_as(const AttentionProblem& problem, const StatisticsOutputs& outputs, const Parallel& parallel) {
  const StatisticsKernel<Real> kernel(problem, outputs);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& scratch) { kernel.run(item, scratch); });
  if (outputs.column_sum == nullptr) return;
  BackwardTensors columns;
  columns.logsumexp = outputs.logsumexp;
  columns.grad_attn_mask.data = outputs.column_sum;
  columns.grad_attn_mask.dtype = kStoredAs<Real>;
  const int64_t strides[4] = {problem.heads * problem.key_length, problem.key_length, 0, 1};
  for (int i = 0; i < 4; ++i) columns.grad_attn_mask.stride[i] = strides[i];
  mask_gradient<ColumnWeights<Real>>(problem, columns, parallel);
}

inline void attention_statistics(const AttentionProblem& problem, const StatisticsOutputs& outputs,
                                 const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    statistics_as<double>(problem, outputs, parallel);
  } else {
    statistics_as<float>(problem, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
