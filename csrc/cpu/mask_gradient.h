// The gradient of a floating attn_mask, a pass of its own: the mask may be broadcast over any dimension, so tasks are
// tiles of the mask's own shape, each of which sums what reaches it. No two tasks write the same element. Included by
// backward.h.
#pragma once

#include "gradient_tile.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Real>
struct MaskGradient {
  using Wanted = typename GradientTile<Real>::Wanted;
  static constexpr int64_t kRows = kMaxVectors * kLanes<Real>;  // one panel
  static constexpr int64_t kKeys = 4 * kBackwardKeys;           // keys of a task: reuses a panel that was packed

  const AttentionProblem& p;
  const BackwardTensors& t;
  bool summed[4];              // dimensions over which the mask was broadcast
  int64_t batches, heads;      // sizes of the gradient
  int64_t row_tiles, key_tiles;

  MaskGradient(const AttentionProblem& problem, const BackwardTensors& tensors) : p(problem), t(tensors) {
    for (int i = 0; i < 4; ++i) summed[i] = t.grad_attn_mask.stride[i] == 0;
    batches = summed[0] ? 1 : p.batch;
    heads = summed[1] ? 1 : p.heads;
    row_tiles = summed[2] ? 1 : (p.query_length + kRows - 1) / kRows;
    key_tiles = summed[3] ? 1 : (p.key_length + kKeys - 1) / kKeys;
  }

  int64_t items() const { return batches * heads * row_tiles * key_tiles; }

  struct Memory {
    GradientTile<Real> tile;
    RowBlock<Real> block;
    Real *sums, *weights, *gradients, *key_scratch, *value_scratch;  // sums: [key][lane] or [lane]

    Memory(const AttentionProblem& p, Scratch& scratch) : tile(p, scratch), block(p, kRows, scratch) {
      sums = scratch.take<Real>(kKeys * kRows);
      weights = scratch.take<Real>(kBackwardKeys * kRows);
      gradients = scratch.take<Real>(kBackwardKeys * kRows);
      key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
      value_scratch = scratch.take<Real>(kBackwardKeys * p.value_dim);
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t key_tile = item % key_tiles, row_tile = item / key_tiles % row_tiles;
    const int64_t head = item / key_tiles / row_tiles % heads, batch = item / key_tiles / row_tiles / heads;
    const KeyRange rows = summed[2] ? KeyRange{0, p.query_length}
                                    : KeyRange{row_tile * kRows, smaller((row_tile + 1) * kRows, p.query_length)};
    const KeyRange keys = summed[3] ? KeyRange{0, p.key_length}
                                    : KeyRange{key_tile * kKeys, smaller((key_tile + 1) * kKeys, p.key_length)};
    Memory memory(p, scratch);
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
    RowBlock<Real>& block = memory.block;
    block.read(p, t, batch, head, row, rows);
    block.normalise_weights(p, stage, memory.tile.scratch, memory.weights, memory.key_scratch);
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    const bool few_queries = rows <= kFewRows;
    for (int64_t key = begin; key < end; key += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, end - key);
      const Rows<Real> key_rows =
          key_value_rows(p.key, batch, kv_head, key, keys, p.head_dim, few_queries, memory.key_scratch);
      const Rows<Real> value_rows =
          key_value_rows(p.value, batch, kv_head, key, keys, p.value_dim, few_queries, memory.value_scratch);
      Real* sums = summed[3] ? memory.sums : memory.sums + (key - wanted.begin) * kRows;
      with_vectors(block.panels.vectors[0], [&]<int kVectors>() {
        add_tile<kVectors>(memory, stage, key, keys, key_rows, value_rows, sums);
      });
    }
  }

  template <int kVectors>
  TA_NOINLINE void add_tile(const Memory& memory, const ScoreStage<Real>& stage, int64_t key, int64_t keys,
                            Rows<Real> key_rows, Rows<Real> value_rows, Real* sums) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const RowBlock<Real>& block = memory.block;
    const KeySpan span = KeySpan::of(stage.band, block.row, block.rows, key, keys, kTileRows<kVectors>);
    if (span.empty()) return;
    if (!memory.tile.template compute<kVectors>(block, stage, 0, key, span, key_rows, value_rows,
                                                Wanted::kScoreGradients, memory.weights, memory.gradients, nullptr)) {
      return;
    }
    for (int64_t j = span.begin; j < span.end; ++j) {
      Real* place = summed[3] ? sums : sums + j * kRows;
      for (int64_t i = 0; i < width; i += kLanes<Real>) {
        store(place + i, load(place + i) + load(memory.gradients + j * width + i));
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

template <class Real>
void mask_gradient(const AttentionProblem& problem, const BackwardTensors& tensors, const Parallel& parallel) {
  const MaskGradient<Real> gradient(problem, tensors);
  for_each_item(parallel, gradient.items(), [&](int64_t item, Scratch& scratch) { gradient.run(item, scratch); });
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
