// The gradient of a floating attn_mask, a pass of its own: the mask may be broadcast over any dimension, so tasks are
// tiles of the mask's own shape, each of which sums what reaches it. No two tasks write the same element. Included by
// backward.h.
#pragma once

#include "gradient_tile.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The scores' gradient, panel by panel, by a tile as backward_walk.h takes it. MaskGradient takes any such source.
template <class Tile>
struct BackwardScores {
  using Real = typename Tile::Real;
  using Block = typename Tile::Block;
  using Tensors = typename Tile::Tensors;

  const AttentionProblem& p;
  Tile tile;
  Real *weights, *gradients, *key_scratch, *value_scratch;
  Rows<Real> key_rows{}, value_rows{};  // the block of keys

  BackwardScores(const AttentionProblem& problem, const Tensors& tensors, Scratch& scratch)
      : p(problem), tile(p, tensors, scratch) {
    constexpr int64_t size = kBackwardKeys * kMaxVectors * kLanes<Real>;
    weights = scratch.take<Real>(size);
    gradients = scratch.take<Real>(size);
    key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
    value_scratch = scratch.take<Real>(kBackwardKeys * p.value_dim);
  }

  void start(Block& block, const ScoreStage<Real>& stage) const {
    block.normalise_weights(p, stage, tile.scratch, weights, key_scratch);
  }

  void load_keys(const Block& block, int64_t key, int64_t keys) {
    const int64_t kv_head = block.head / (p.heads / p.kv_heads);
    const bool few_queries = block.rows <= kFewRows;
    key_rows = key_value_rows(p.key, block.batch, kv_head, key, keys, p.head_dim, few_queries, key_scratch);
    value_rows = key_value_rows(p.value, block.batch, kv_head, key, keys, p.value_dim, few_queries, value_scratch);
  }

  // [key][lane] for the keys of span and the block's first panel; null where nothing is attended.
  template <int kVectors>
  TA_INLINE const Real* score_gradients(const Block& block, const ScoreStage<Real>& stage, int64_t key,
                                        const KeySpan& span) const {
    const bool any = tile.template compute<kVectors>(block, stage, 0, key, span, key_rows, value_rows,
                                                     Tile::Wanted::kScoreGradients, weights, gradients, nullptr);
    return any ? gradients : nullptr;
  }
};

template <class Scores>
struct MaskGradient {
  using Real = typename Scores::Real;
  using Tensors = typename Scores::Tensors;
  static constexpr int64_t kRows = kMaxVectors * kLanes<Real>;  // one panel
  static constexpr int64_t kKeys = 4 * kBackwardKeys;           // keys of a task: reuses a panel that was packed

  const AttentionProblem& p;
  const Tensors& t;
  bool summed[4];          // dimensions over which the mask was broadcast
  int64_t batches, heads;  // sizes of the gradient
  int64_t row_tiles, key_tiles;

  MaskGradient(const AttentionProblem& problem, const Tensors& tensors) : p(problem), t(tensors) {
    for (int i = 0; i < 4; ++i) summed[i] = t.grad_attn_mask.stride[i] == 0;
    batches = summed[0] ? 1 : p.batch;
    heads = summed[1] ? 1 : p.heads;
    row_tiles = summed[2] ? 1 : (p.query_length + kRows - 1) / kRows;
    key_tiles = summed[3] ? 1 : (p.key_length + kKeys - 1) / kKeys;
  }

  int64_t items() const { return batches * heads * row_tiles * key_tiles; }

  struct Memory {
    Scores scores;
    typename Scores::Block block;
    Real* sums;  // [key][lane] or [lane]

    Memory(const AttentionProblem& p, const Tensors& t, Scratch& scratch)
        : scores(p, t, scratch), block(p, kRows, scratch), sums(scratch.take<Real>(kKeys * kRows)) {}
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t key_tile = item % key_tiles, row_tile = item / key_tiles % row_tiles;
    const int64_t head = item / key_tiles / row_tiles % heads, batch = item / key_tiles / row_tiles / heads;
    const KeyRange rows = summed[2] ? KeyRange{0, p.query_length}
                                    : KeyRange{row_tile * kRows, smaller((row_tile + 1) * kRows, p.query_length)};
    const KeyRange keys = summed[3] ? KeyRange{0, p.key_length}
                                    : KeyRange{key_tile * kKeys, smaller((key_tile + 1) * kKeys, p.key_length)};
    Memory memory(p, t, scratch);
    fill<Real>(memory.sums, 0, kKeys * kRows);
    for (int64_t b = summed[0] ? 0 : batch; b < (summed[0] ? p.batch : batch + 1); ++b) {
      for (int64_t h = summed[1] ? 0 : head; h < (summed[1] ? p.heads : head + 1); ++h) {
        for (int64_t row = rows.begin; row < rows.end; row += kRows) {
          add_panel(memory, b, h, row, smaller(kRows, rows.end - row), keys);
        }
      }
    }
    store_sums(memory.sums, batch, head, rows, keys);
  }

  // Adds one (batch, head)'s score gradients of one panel of rows to the sums.
  void add_panel(Memory& memory, int64_t batch, int64_t head, int64_t row, int64_t rows, KeyRange wanted) const {
    const ScoreStage<Real> stage(p, batch, head);
    const KeyRange any = stage.band.keys_of_any(row, row + rows);
    const int64_t begin = larger(wanted.begin, any.begin), end = smaller(wanted.end, any.end);
    if (begin >= end) return;
    memory.block.read(p, t, batch, head, row, rows);
    memory.scores.start(memory.block, stage);
    for (int64_t key = begin; key < end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, end - key);
      memory.scores.load_keys(memory.block, key, keys);
      Real* sums = summed[3] ? memory.sums : memory.sums + (key - wanted.begin) * kRows;
      with_vectors(memory.block.panels.vectors[0],
                   [&]<int kVectors>() { add_tile<kVectors>(memory, stage, key, keys, sums); });
    }
  }

  template <int kVectors>
  TA_NOINLINE void add_tile(const Memory& memory, const ScoreStage<Real>& stage, int64_t key, int64_t keys,
                            Real* sums) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const auto& block = memory.block;
    const KeySpan span = KeySpan::of(stage.band, block.row, block.rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    const Real* gradients = memory.scores.template score_gradients<kVectors>(block, stage, key, span);
    if (gradients == nullptr) return;
    for (int64_t j = span.begin; j < span.end; ++j) {
      Real* place = summed[3] ? sums : sums + j * kRows;
      for (int64_t i = 0; i < width; i += kLanes<Real>) {
        store(place + i, load(place + i) + load(gradients + j * width + i));
      }
    }
  }

  void store_sums(const Real* sums, int64_t batch, int64_t head, KeyRange rows, KeyRange keys) const {
    const TensorView& grad = t.grad_attn_mask;
    Real* out = reinterpret_cast<Real*>(element(grad, batch, head, rows.begin)) + keys.begin * grad.stride[3];
    const int64_t key_count = summed[3] ? 1 : keys.end - keys.begin;
    for (int64_t j = 0; j < key_count; ++j) {
      Real* column = out + j * grad.stride[3];
      if (summed[2]) {
        Real sum = 0;
        for (int64_t i = 0; i < kRows; ++i) sum += sums[j * kRows + i];
        *column = sum;
      } else {
        for (int64_t i = 0; i < rows.end - rows.begin; ++i) column[i * grad.stride[2]] = sums[j * kRows + i];
      }
    }
  }
};

template <class Scores>
void mask_gradient(const AttentionProblem& problem, const typename Scores::Tensors& tensors, const Parallel& parallel) {
  const MaskGradient<Scores> gradient(problem, tensors);
  for_each_item(parallel, gradient.items(), [&](int64_t item, Scratch& scratch) { gradient.run(item, scratch); });
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
