// attention_weights: the weights themselves, or their mean over heads, and on request attention's output with them. A
// task is one panel of query rows. Where logsumexp is known, weights follow from scores at once; where it is not, a
// panel's scores with all of its keys wait for it, so that no product is computed twice. The mean gathers the heads
// before it is written: nothing of the size of all heads' weights exists. Included by instantiate/map_*.cpp.
#pragma once

#include "map_kernels.h"
#include "tasks.h"
#include "weight_tile.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The two products, on vectors: one panel of one head's rows, with blocks of keys. bfloat16/ brings its own.
template <class RealType>
struct VectorPanel {
  using Real = RealType;
  static constexpr int64_t kRows = kMaxVectors * kLanes<Real>;
  static constexpr int64_t kKeys = kBackwardKeys;  // per block
  static constexpr int64_t kPaddedKeys = 0;        // how far scores may write beyond a block's keys
  static constexpr bool kCombines = true;          // whether it multiplies weights by values

  // What all tasks share: keys and, if an output is computed, values, copied once where every panel would copy them.
  struct Shared {
    static constexpr bool infinite = false;
    const Real *keys = nullptr, *values = nullptr;  // [batch · kv head][key][column]; null where they are read in place

    Shared(const AttentionProblem& p, bool with_output, const Parallel& parallel, Scratch& scratch) {
      if (p.query_length <= kRows) return;
      keys = copy(p, p.key, p.head_dim, parallel, scratch);
      if (with_output) values = copy(p, p.value, p.value_dim, parallel, scratch);
    }

    static const Real* copy(const AttentionProblem& p, const TensorView& view, int64_t columns,
                            const Parallel& parallel, Scratch& scratch) {
      if (view.dtype == kStoredAs<Real> && view.stride[2] == columns) return nullptr;
      auto* rows = scratch.take<Real>(p.batch * p.kv_heads * p.key_length * columns);
      const int64_t blocks = (p.key_length + kKeys - 1) / kKeys;
      for_each_item(parallel, p.batch * p.kv_heads * blocks, [&](int64_t item, Scratch&) {
        const int64_t key = item % blocks * kKeys, head = item / blocks;
        load_rows(rows + (head * p.key_length + key) * columns, columns, view,
                  element(view, head / p.kv_heads, head % p.kv_heads, key), smaller(kKeys, p.key_length - key),
                  columns);
      });
      return rows;
    }

    static TA_INLINE Rows<Real> block(const AttentionProblem& p, const Real* copied, const TensorView& view,
                                      int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t columns,
                                      bool few_rows, Real* memory) {
      const int64_t kv_head = head / (p.heads / p.kv_heads);
      if (copied == nullptr) return key_value_rows(view, batch, kv_head, key, keys, columns, few_rows, memory);
      return {copied + ((batch * p.kv_heads + kv_head) * p.key_length + key) * columns, columns};
    }
  };

  const AttentionProblem& p;
  const Shared& shared;
  TileScratch<Real> tile;
  Real *query, *row_memory, *key_scratch, *value_scratch;
  int64_t batch = 0, head = 0, row = 0, rows = 0;
  int vectors = 1;

  VectorPanel(const AttentionProblem& problem, const Shared& state, Scratch& scratch)
      : p(problem), shared(state), tile(problem, scratch) {
    query = scratch.take<Real>(kRows * p.head_dim);
    row_memory = scratch.take<Real>(kRows * round_up(p.head_dim, kLanes<Real>));
    key_scratch = scratch.take<Real>(kKeys * p.head_dim);
    value_scratch = scratch.take<Real>(kKeys * p.value_dim);
  }

  void start(int64_t new_batch, int64_t new_head, int64_t first_row, int64_t row_count) {
    batch = new_batch, head = new_head, row = first_row, rows = row_count;
    vectors = Panels::of<Real>(rows).vectors[0];
    const Rows<Real> loaded = padded_rows(p.query, batch, head, row, rows, p.head_dim, row_memory);
    pack_panel(query, vectors * kLanes<Real>, loaded.data, loaded.stride, rows, p.head_dim);
  }

  // Calls body.template operator()<kVectors>() for the panel's width.
  template <class Body>
  TA_INLINE void with_width(const Body& body) const {
    with_vectors(vectors, body);
  }

  // out[key][lane] for a block of keys: the scores, −∞ where a key is not attended; maximum is raised to include them
  // if it is not null. False where all are −∞: then nothing is written.
  template <int kVectors>
  TA_NOINLINE bool scores(const ScoreStage<Real>& stage, int64_t key, int64_t keys, Real* out, Real* maximum) {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, keys, kTileRows<kVectors>);
    BiasTile<Real> bias;
    if (span.empty() || !load_bias<Real, kVectors>(stage, tile, row, rows, key, span, bias)) return false;
    const Rows<Real> key_rows =
        Shared::block(p, shared.keys, p.key, batch, head, key, keys, p.head_dim, rows <= kFewRows, key_scratch);
    const Real nothing = -static_cast<Real>(__builtin_inf());
    fill<Real>(out, nothing, span.begin * width);
    fill<Real>(out + span.end * width, nothing, (keys - span.end) * width);
    if (maximum != nullptr) {
      score_tile<Real, kVectors, true>(stage, bias, span, p.head_dim, key_rows, query, row, key, out, nullptr, maximum);
    } else {
      score_tile<Real, kVectors, false>(stage, bias, span, p.head_dim, key_rows, query, row, key, out, nullptr,
                                        nullptr);
    }
    return true;
  }

  static TA_INLINE Vec<Real> exp(Vec<Real> x) { return VectorMath<Real>::exp(x); }

  // out[column][lane] += Σ_key value[key][column] · weights[key][lane].
  template <int kVectors>
  TA_NOINLINE void combine(int64_t key, int64_t keys, const Real* weights, Real* out) {
    const Rows<Real> value_rows =
        Shared::block(p, shared.values, p.value, batch, head, key, keys, p.value_dim, rows <= kFewRows, value_scratch);
    combine_rows<Real, kVectors, false>(p.value_dim, keys, value_rows.data, value_rows.stride, weights, out, nullptr);
  }

  // Writes weights [key][lane] times factor[lane] to the rows of a tensor that start at columns, as far as that needs
  // no detour; returns how many of the keys are done.
  template <int kVectors>
  static TA_INLINE int64_t write(const TensorView& out, char* columns, const Real* weights, const Real* factor,
                                 int64_t rows, int64_t keys) {
    const int64_t done = out.dtype == kStoredAs<Real> ? round_down(keys, kLanes<Real>) : 0;
    if (done > 0) {
      unpack_panel(reinterpret_cast<Real*>(columns), out.stride[2], weights, kVectors * kLanes<Real>, factor, rows,
                   done);
    }
    return done;
  }
};

// exp(score − subtracted) in place for a block of keys; sum, unless null, is brought up to date.
template <class Panel, int kVectors, class Real>
TA_NOINLINE void exponentials(int64_t keys, const Real* subtracted, Real* scores, Real* sum) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> row[kVectors], block_sum[kVectors] = {};
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) row[n] = load(subtracted + n * n_lanes);
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      Real* place = scores + j * width + n * n_lanes;
      const Vec<Real> weight = Panel::exp(load(place) - row[n]);
      block_sum[n] += weight;
      store(place, weight);
    }
  }
  if (sum == nullptr) return;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) store(sum + n * n_lanes, load(sum + n * n_lanes) + block_sum[n]);
}

// sums[key][lane] = or, unless it is the first, += weights[key][lane] · factor[lane]
template <bool kFirst, int kVectors, class Real>
TA_NOINLINE void add_scaled(int64_t keys, const Real* weights, const Real* factor, Real* sums) {
  constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
  Vec<Real> row[kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) row[n] = load(factor + n * n_lanes);
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int64_t place = j * width + n * n_lanes;
      const Vec<Real> scaled = load(weights + place) * row[n];
      store(sums + place, kFirst ? scaled : load(sums + place) + scaled);
    }
  }
}

// Keys [begin, end) of the rows [row, row + rows) of one head's weights.
TA_INLINE void zero_columns(const TensorView& out, int64_t batch, int64_t head, int64_t row, int64_t rows,
                            int64_t begin, int64_t end) {
  const int64_t size = element_size(out.dtype);
  if (begin >= end) return;
  for (int64_t i = 0; i < rows; ++i)
    __builtin_memset(element(out, batch, head, row + i) + begin * size, 0, (end - begin) * size);
}

template <class Panel>
struct WeightsKernel {
  using Real = typename Panel::Real;
  static constexpr int64_t kRows = Panel::kRows, kKeys = Panel::kKeys;
  static constexpr int64_t kMeanKeys = 8 * kKeys;  // of a chunk, with a known logsumexp: reuses a packed panel

  const AttentionProblem& p;
  const SoftmaxOutputs& outputs;
  const typename Panel::Shared& shared;
  int64_t row_blocks;

  WeightsKernel(const AttentionProblem& problem, const SoftmaxOutputs& out, const typename Panel::Shared& state)
      : p(problem), outputs(out), shared(state), row_blocks((p.query_length + kRows - 1) / kRows) {}

  int64_t heads() const { return outputs.mean ? 1 : p.heads; }  // of the weights
  int64_t items() const { return p.batch * heads() * row_blocks; }

  struct Memory {
    Panel panel;
    int64_t batch, row, rows;
    Real *weights, *sums;  // [key][lane] of a chunk; sums: of the heads
    Real *maximum, *sum, *factor, *out, *out_rows, *weight_rows;

    Memory(const AttentionProblem& p, const typename Panel::Shared& shared, int64_t chunk, bool mean, Scratch& scratch)
        : panel(p, shared, scratch) {
      weights = scratch.take<Real>((chunk + Panel::kPaddedKeys) * kRows);
      sums = scratch.take<Real>(mean ? chunk * kRows : 0);
      for (Real** array : {&maximum, &sum, &factor}) *array = scratch.take<Real>(kRows);
      if constexpr (Panel::kCombines) {
        out = scratch.take<Real>(kRows * p.value_dim);
        out_rows = scratch.take<Real>(kRows * round_up(p.value_dim, kLanes<Real>));
      }
      weight_rows = scratch.take<Real>(kRows * round_up(kKeys, kLanes<Real>));
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    const int64_t batch = item / (heads() * row_blocks), first_head = item / row_blocks % heads();
    const int64_t row = (row_blocks - 1 - item % row_blocks) * kRows;  // with a causal mask, long rows first
    const int64_t rows = smaller(kRows, p.query_length - row);
    const KeyRange any = band_mask_of_selected_rows(p, batch).keys_of_any(row, row + rows);
    // Blocks of keys start at multiples of kKeys, for panels whose shared values are cut up so.
    const KeyRange range = any.empty() ? KeyRange{} : KeyRange{round_down(any.begin, kKeys), any.end};
    zero_columns(outputs.weights, batch, first_head, row, rows, 0, range.begin);
    zero_columns(outputs.weights, batch, first_head, row, rows, range.end, p.key_length);
    const bool known = outputs.logsumexp != nullptr && !any_large_logsumexp(batch, first_head, row, rows);
    if (known && range.empty()) return;
    const int64_t all_keys = range.end - range.begin;
    const int64_t chunk = !known ? all_keys : smaller(all_keys, outputs.mean ? kMeanKeys : kKeys);
    Memory memory(p, shared, chunk, outputs.mean, scratch);
    memory.batch = batch, memory.row = row, memory.rows = rows;
    for (int64_t first = range.begin; first < range.end || first == range.begin; first += larger<int64_t>(chunk, 1)) {
      const int64_t last = smaller(first + chunk, range.end);
      for (int64_t head = first_head; head < (outputs.mean ? p.heads : first_head + 1); ++head) {
        if (outputs.mean || first == range.begin) memory.panel.start(batch, head, row, rows);
        const ScoreStage<Real> stage(p, batch, head);
        memory.panel.with_width([&]<int kVectors>() {
          known ? from_logsumexp<kVectors>(memory, stage, first, last) : from_scores<kVectors>(memory, stage, range);
          if (outputs.mean) {
            for (int64_t i = 0; i < kVectors * kLanes<Real>; ++i) memory.factor[i] /= static_cast<Real>(p.heads);
            head == 0 ? add_scaled<true, kVectors>(last - first, memory.weights, memory.factor, memory.sums)
                      : add_scaled<false, kVectors>(last - first, memory.weights, memory.factor, memory.sums);
          } else {
            write<kVectors>(memory, head, first, last, memory.weights);
          }
        });
      }
      if (!outputs.mean) continue;
      fill<Real>(memory.factor, 1, kRows);
      memory.panel.with_width([&]<int kVectors>() { write<kVectors>(memory, 0, first, last, memory.sums); });
    }
  }

  // A rounded logsumexp would scale a row's weights (core/online_softmax.h): such panels compute their own sum.
  bool any_large_logsumexp(int64_t batch, int64_t first_head, int64_t row, int64_t rows) const {
    bool any = false;
    for (int64_t head = first_head; head < (outputs.mean ? p.heads : first_head + 1); ++head) {
      const Real* first = known_logsumexp(batch, head, row);
      for (int64_t i = 0; i < rows; ++i) any = any || is_large_logsumexp(first[i]);
    }
    return any;
  }
  const Real* known_logsumexp(int64_t batch, int64_t head, int64_t row) const {
    return static_cast<const Real*>(outputs.logsumexp) + (batch * p.heads + head) * p.query_length + row;
  }

  // Calls body(key, keys, place) for the blocks of keys [first, last), whose weights lie at place.
  template <int kVectors, class Body>
  static TA_INLINE void for_each_block(Real* weights, int64_t first, int64_t last, const Body& body) {
    for (int64_t key = first; key < last; key += kKeys)
      body(key, smaller(kKeys, last - key), weights + (key - first) * kVectors * kLanes<Real>);
  }

  // Weights of the keys [first, last) in memory.weights; factor is 1.
  template <int kVectors>
  TA_NOINLINE void from_logsumexp(Memory& memory, const ScoreStage<Real>& stage, int64_t first, int64_t last) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const Real infinity = static_cast<Real>(__builtin_inf());
    const Real* logsumexp = known_logsumexp(memory.batch, memory.panel.head, memory.row);
    for (int64_t i = 0; i < width; ++i) {  // a row with nothing to attend has weights exp(−∞); +∞ makes NaN
      const Real stored = i < memory.rows ? logsumexp[i] : -infinity;
      memory.maximum[i] = stored == -infinity  ? infinity
                          : stored == infinity ? static_cast<Real>(__builtin_nan(""))
                                               : stored;
    }
    fill<Real>(memory.factor, 1, kRows);
    for_each_block<kVectors>(memory.weights, first, last, [&](int64_t key, int64_t keys, Real* place) {
      if (!memory.panel.template scores<kVectors>(stage, key, keys, place, nullptr)) {
        fill<Real>(place, 0, keys * width);
      } else {
        exponentials<Panel, kVectors>(keys, memory.maximum, place, static_cast<Real*>(nullptr));
      }
    });
  }

  // The same for all keys of the panel's range, not yet multiplied by factor; and logsumexp and output.
  template <int kVectors>
  TA_NOINLINE void from_scores(Memory& memory, const ScoreStage<Real>& stage, const KeyRange& range) const {
    using Math = VectorMath<Real>;
    using Softmax = OnlineSoftmax<Math>;
    constexpr int n_lanes = kLanes<Real>, width = kVectors * n_lanes;
    const Real nothing = -static_cast<Real>(__builtin_inf());
    Real sink = nothing;
    if (p.sinks.defined()) sink = head_number<Real>(p.sinks, memory.batch, memory.panel.head);
    fill<Real>(memory.maximum, sink, width);
    for_each_block<kVectors>(memory.weights, range.begin, range.end, [&](int64_t key, int64_t keys, Real* place) {
      if (!memory.panel.template scores<kVectors>(stage, key, keys, place, memory.maximum))
        fill<Real>(place, nothing, keys * width);
    });

    for (int64_t i = 0; i < width; i += n_lanes) {
      const Vec<Real> maximum = load(memory.maximum + i);
      store(memory.factor + i, Softmax::safe_maximum(maximum));
      const Vec<Real> sink_weight = Math::exp(splat(sink) - Softmax::safe_maximum(maximum));
      store(memory.sum + i, sink == nothing ? splat(Real{0}) : sink_weight);
    }
    const bool with_output = Panel::kCombines && outputs.out.defined();
    if (with_output) fill<Real>(memory.out, 0, p.value_dim * width);
    for_each_block<kVectors>(memory.weights, range.begin, range.end, [&](int64_t key, int64_t keys, Real* place) {
      exponentials<Panel, kVectors>(keys, memory.factor, place, memory.sum);
      if constexpr (Panel::kCombines) {
        if (with_output) memory.panel.template combine<kVectors>(key, keys, place, memory.out);
      }
    });

    for (int64_t i = 0; i < width; i += n_lanes) {
      const Vec<Real> sum = load(memory.sum + i);
      store(memory.maximum + i, Softmax::logsumexp(load(memory.maximum + i), sum));
      store(memory.factor + i, Softmax::inverse_sum(sum));
    }
    const int64_t first = (memory.batch * p.heads + memory.panel.head) * p.query_length + memory.row;
    if (outputs.computed_logsumexp != nullptr) {
      __builtin_memcpy(static_cast<Real*>(outputs.computed_logsumexp) + first, memory.maximum,
                       memory.rows * sizeof(Real));
    }
    if (with_output) {
      store_panel(outputs.out, memory.batch, memory.panel.head, memory.row, memory.rows, p.value_dim, memory.out, width,
                  memory.factor, memory.out_rows);
    }
  }

  // Writes the columns [first, last) of the panel's rows, times factor: whole vectors in place where the type allows
  // it, the rest by way of rows of accumulators.
  template <int kVectors>
  TA_NOINLINE void write(const Memory& memory, int64_t head, int64_t first, int64_t last, Real* weights) const {
    constexpr int64_t width = kVectors * kLanes<Real>;
    const TensorView& out = outputs.weights;
    const int64_t size = element_size(out.dtype);
    for_each_block<kVectors>(weights, first, last, [&](int64_t key, int64_t keys, Real* place) {
      char* columns = element(out, memory.batch, head, memory.row) + key * size;
      const int64_t in_place = Panel::template write<kVectors>(out, columns, place, memory.factor, memory.rows, keys);
      if (in_place == keys) return;
      const int64_t rest = keys - in_place, stride = round_up(rest, kLanes<Real>);
      unpack_panel(memory.weight_rows, stride, place + in_place * width, width, memory.factor, memory.rows, rest);
      store_rows(out, columns + in_place * size, memory.weight_rows, stride, memory.rows, rest);
    });
  }
};

// False where the panel's products cannot serve some number: weights are then undefined.
template <class Panel>
bool weights_with(const AttentionProblem& problem, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  Scratch scratch;
  const typename Panel::Shared shared(problem, outputs.out.defined(), parallel, scratch);
  const WeightsKernel<Panel> kernel(problem, outputs, shared);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& memory) { kernel.run(item, memory); });
  return !shared.infinite;
}

template <template <class> class Panel>
void weights_by_type(const AttentionProblem& problem, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  if (problem.dtype == ScalarType::kFloat64) {
    weights_with<Panel<double>>(problem, outputs, parallel);
  } else {
    weights_with<Panel<float>>(problem, outputs, parallel);
  }
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
