// attention_weights: the weights themselves, or their mean over heads, from a known logsumexp. A task is one panel of
// query rows; the mean gathers a chunk of keys over all heads before it is written, so that nothing of the size of all
// heads' weights exists. Included by instantiate/map_*.cpp.
#pragma once

#include "map_kernels.h"
#include "tasks.h"
#include "weight_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Real>
struct WeightsKernel {
  static constexpr int64_t kRows = kMaxVectors * kLanes<Real>;  // one panel
  static constexpr int64_t kMeanKeys = 8 * kBackwardKeys;       // keys of a chunk: reuses a panel that was packed

  const AttentionProblem& p;
  const WeightsOutputs& outputs;
  int64_t row_blocks;
  BackwardTensors read;  // what RowBlock reads of them: logsumexp

  WeightsKernel(const AttentionProblem& problem, const WeightsOutputs& out)
      : p(problem), outputs(out), row_blocks((p.query_length + kRows - 1) / kRows) {
    read.logsumexp = out.logsumexp;
  }

  int64_t heads() const { return outputs.mean ? 1 : p.heads; }  // of the output
  int64_t items() const { return p.batch * heads() * row_blocks; }

  struct Memory {
    RowBlock<Real> block;
    WeightTile<Real> tile;
    Real *weights, *sums, *factor, *key_scratch, *rows;

    Memory(const AttentionProblem& p, int64_t chunk, Scratch& scratch) : block(p, kRows, scratch), tile(p, scratch) {
      weights = scratch.take<Real>(kBackwardKeys * kRows);
      sums = scratch.take<Real>(chunk * kRows);
      factor = scratch.take<Real>(kRows);
      key_scratch = scratch.take<Real>(kBackwardKeys * p.head_dim);
      rows = scratch.take<Real>(kRows * round_up(larger(kBackwardKeys, chunk), kLanes<Real>));
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t batch = item / (heads() * row_blocks), head = item / row_blocks % heads();
    const int64_t row = (row_blocks - 1 - item % row_blocks) * kRows;  // with a causal mask, long rows first
    const int64_t rows = smaller(kRows, p.query_length - row);
    const KeyRange any = band_mask_of_selected_rows(p, batch).keys_of_any(row, row + rows);
    const KeyRange range = any.empty() ? KeyRange{} : any;
    zero(batch, head, row, rows, 0, range.begin);
    zero(batch, head, row, rows, range.end, p.key_length);
    if (range.empty()) return;
    // normalise_weights walks over all keys: once then.
    const int64_t chunk = !outputs.mean                           ? 0
                          : any_large_logsumexp(batch, row, rows) ? range.end - range.begin
                                                                  : kMeanKeys;
    Memory memory(p, chunk, scratch);
    fill<Real>(memory.factor, outputs.mean ? 1 / static_cast<Real>(p.heads) : Real{1}, kRows);
    if (!outputs.mean) {
      const ScoreStage<Real> stage = start(memory, batch, head, row, rows);
      for (int64_t key = range.begin; key < range.end; key += kBackwardKeys) {
        const int64_t keys = smaller(kBackwardKeys, range.end - key);
        with_panel(memory, [&]<int kVectors>() {
          compute<kVectors>(memory, stage, key, keys);
          write<kVectors>(memory, batch, head, key, keys, memory.weights);
        });
      }
      return;
    }
    for (int64_t first = range.begin; first < range.end; first += chunk) {
      const int64_t last = smaller(first + chunk, range.end);
      fill<Real>(memory.sums, 0, (last - first) * kRows);
      for (int64_t h = 0; h < p.heads; ++h) {
        const ScoreStage<Real> stage = start(memory, batch, h, row, rows);
        for (int64_t key = first; key < last; key += kBackwardKeys) {
          with_panel(memory, [&]<int kVectors>() {
            add<kVectors>(memory, stage, key, smaller(kBackwardKeys, last - key), memory.sums, key - first);
          });
        }
      }
      with_panel(memory, [&]<int kVectors>() { write<kVectors>(memory, batch, 0, first, last - first, memory.sums); });
    }
  }

  bool any_large_logsumexp(int64_t batch, int64_t row, int64_t rows) const {
    const Real* logsumexp = static_cast<const Real*>(outputs.logsumexp);
    bool any = false;
    for (int64_t h = 0; h < p.heads; ++h) {
      const Real* first = logsumexp + (batch * p.heads + h) * p.query_length + row;
      for (int64_t i = 0; i < rows; ++i) any = any || is_large_logsumexp(first[i]);
    }
    return any;
  }

  template <class Body>
  static TA_INLINE void with_panel(const Memory& memory, const Body& body) {
    with_vectors(memory.block.panels.vectors[0], body);
  }

  ScoreStage<Real> start(Memory& memory, int64_t batch, int64_t head, int64_t row, int64_t rows) const {
    const ScoreStage<Real> stage(p, batch, head);
    memory.block.read(p, read, batch, head, row, rows);
    memory.block.normalise_weights(p, stage, memory.tile.scratch, memory.weights, memory.key_scratch);
    return stage;
  }

  // The weights of a block of keys, all of them written. Returns the keys that may be attended.
  template <int kVectors>
  TA_NOINLINE KeySpan compute(Memory& memory, const ScoreStage<Real>& stage, int64_t key, int64_t keys) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    KeySpan span = KeySpan::of(stage.band, memory.block.row, memory.block.rows, key, keys, kTileRows<kVectors>);
    if (!span.empty()) {
      const Rows<Real> key_rows = key_rows_of(p, memory.block, key, keys, memory.key_scratch);
      if (!memory.tile.template compute<kVectors>(memory.block, stage, 0, key, span, key_rows, memory.weights))
        span.begin = span.end = 0;
    }
    if (span.empty()) span.begin = span.end = 0;
    fill<Real>(memory.weights, 0, span.begin * width);
    fill<Real>(memory.weights + span.end * width, 0, (keys - span.end) * width);
    return span;
  }

  template <int kVectors>
  TA_NOINLINE void add(Memory& memory, const ScoreStage<Real>& stage, int64_t key, int64_t keys, Real* sums,
                       int64_t place) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const KeySpan span = compute<kVectors>(memory, stage, key, keys);
    for (int64_t i = span.begin * width; i < span.end * width; i += kLanes<Real>) {
      Real* sum = sums + place * width + i;
      store(sum, load(sum) + load(memory.weights + i));
    }
  }

  // Writes the columns [key, key + keys) of the block's rows from a panel [key][lane]: whole vectors in place where the
  // type allows it, the rest by way of rows of accumulators.
  template <int kVectors>
  TA_NOINLINE void write(const Memory& memory, int64_t batch, int64_t head, int64_t key, int64_t keys,
                         const Real* panel) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const TensorView& out = outputs.weights;
    const RowBlock<Real>& block = memory.block;
    char* first = element(out, batch, head, block.row) + key * element_size(out.dtype);
    const int64_t in_place = out.dtype == kStoredAs<Real> ? round_down(keys, kLanes<Real>) : 0;
    unpack_panel(reinterpret_cast<Real*>(first), out.stride[2], panel, width, memory.factor, block.rows, in_place);
    if (in_place == keys) return;
    const int64_t rest = keys - in_place, stride = round_up(rest, kLanes<Real>);
    unpack_panel(memory.rows, stride, panel + in_place * width, width, memory.factor, block.rows, rest);
    store_rows(out, first + in_place * element_size(out.dtype), memory.rows, stride, block.rows, rest);
  }

  void zero(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t begin, int64_t end) const {
    const TensorView& out = outputs.weights;
    const int64_t size = element_size(out.dtype);
    if (begin >= end) return;
    for (int64_t i = 0; i < rows; ++i)
      __builtin_memset(element(out, batch, head, row + i) + begin * size, 0, (end - begin) * size);
  }
};

template <class Real>
void weights_as(const AttentionProblem& problem, const WeightsOutputs& outputs, const Parallel& parallel) {
  const WeightsKernel<Real> kernel(problem, outputs);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& scratch) { kernel.run(item, scratch); });
}

inline void attention_weights(const AttentionProblem& problem, const WeightsOutputs& outputs,
                              const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    weights_as<double>(problem, outputs, parallel);
  } else {
    weights_as<float>(problem, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
