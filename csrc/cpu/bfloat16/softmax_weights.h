// attention_weights of bfloat16 where logsumexp is yet to be found, and attention's output with them: what
// MultiheadAttention calls for need_weights=True. A task is kTaskRows rows of one head or, for the mean, of all heads
// in turn. Output and weights come from one walk over the keys like that of forward.h: the second product reads the
// weights as pairs of bfloat16 anyway, so these wait, half as large as scores, until the row's sum is known, and no
// exponential is computed twice. Included by map_kernels.h.
#pragma once

#include "softmax_pairs.h"
#include "weights.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Rows of a task. Each reads all keys and values of its heads, from beyond the L2 cache: 32 rows are 5 % slower at
// L 4096; 128 leave too little of the L2 cache to the weights (4 % slower at L 1024).
constexpr int64_t kTaskRows = 2 * kAmxLanes;
// Heads whose weights are gathered at once for the mean, read and written once for all of them. 1 is 1 % slower at
// L 2048 and 9 % at L 4096.
constexpr int64_t kHeadsAtOnce = 4;
constexpr int64_t kMostPairs = int64_t{1} << 21;  // of the gathered heads; from L 16384 on they are fewer
constexpr int64_t kLine = 64;                     // bytes

// Asks the L2 cache for what comes next, a few lines at a time between other work: more than a core has outstanding
// reads (16) at once would hold up all others, and be slower than not asking.
struct Ahead {
  static constexpr int64_t kLinesAtOnce = 16;
  const char *place, *end;

  TA_INLINE void ask() {
    constexpr int kIntoL2 = 2;  // __builtin_prefetch's locality
    const char* last = smaller<int64_t>(end - place, kLinesAtOnce * kLine) + place;
    for (; place < last; place += kLine) __builtin_prefetch(place, 0, kIntoL2);
  }
};

// The weights of heads at one panel and block of keys: pairs [head][key / 2][lane][2], factors [head][lane].
struct PairedHeads {
  int64_t count;
  const uint16_t* pairs;
  int64_t head_stride;
  const float* factors;

  // body(even, odd): Σ pairs · factor of the keys j and j + 1 for the lanes from lane on, added to sums if not null.
  template <class Body>
  TA_INLINE void gather(int64_t j, int64_t lane, const float* sums, const Body& body) const {
    const float* before = sums + j * kAmxLanes + lane;
    Vec<float> even = sums == nullptr ? Vec<float>{} : load(before);
    Vec<float> odd = sums == nullptr ? Vec<float>{} : load(before + kAmxLanes);
    for (int64_t i = 0; i < count; ++i) {
      const __m512i both = _mm512_loadu_si512(pairs + i * head_stride + j * kAmxLanes + 2 * lane);
      const Vec<float> factor = load(factors + i * kAmxLanes + lane);
      even += (Vec<float>)_mm512_slli_epi32(both, 16) * factor;
      odd += (Vec<float>)_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))) * factor;
    }
    body(even, odd);
  }
};

// sums[key][lane] = (kFirst) or += the heads' weights of keys [0, keys).
template <bool kFirst>
TA_NOINLINE void add_heads(const PairedHeads& heads, int64_t keys, float* sums) {
  for (int64_t lane = 0; lane < kAmxLanes; lane += kLanes<float>) {
    for (int64_t j = 0; j < keys; j += 2) {
      float* place = sums + j * kAmxLanes + lane;
      heads.gather(j, lane, kFirst ? nullptr : sums, [&](Vec<float> even, Vec<float> odd) TA_INLINE_LAMBDA {
        store(place, even);
        store(place + kAmxLanes, odd);
      });
    }
  }
}

// The same, and sums (null: nothing) added, written to the rows of a tensor that start at columns. Not by streaming
// stores: a new page's zeros lie in the cache, and these would have to be thrown out (1.2 times slower at H 8, L 2048;
// 1.06 times faster into memory that was written before).
TA_NOINLINE inline void write_heads(const PairedHeads& heads, int64_t keys, const float* sums, const TensorView& out,
                                    char* columns, int64_t rows) {
  constexpr int n_lanes = kLanes<float>;
  const int64_t step = out.stride[2] * static_cast<int64_t>(sizeof(uint16_t));
  alignas(64) uint16_t square[n_lanes][2 * n_lanes];
  for (int64_t i = 0; i < rows; i += n_lanes) {
    for (int64_t j = 0; j < keys; j += 2 * n_lanes) {
      for (int pair = 0; pair < n_lanes; ++pair) {
        heads.gather(j + 2 * pair, i, sums,
                     [&](Vec<float> even, Vec<float> odd) TA_INLINE_LAMBDA { store_pairs(square[pair], even, odd); });
      }
      // Neighbouring keys are one 32-bit element, so that a transposed tile holds 32 keys of a row.
      Vec<float> lanes[n_lanes];
#pragma GCC unroll 16
      for (int pair = 0; pair < n_lanes; ++pair) lanes[pair] = load(reinterpret_cast<const float*>(square[pair]));
      transpose_in_registers<float>(lanes);
      char* to = columns + i * step + j * static_cast<int64_t>(sizeof(uint16_t));
      const int64_t bytes = smaller<int64_t>(keys - j, 2 * n_lanes) * static_cast<int64_t>(sizeof(uint16_t));
      if (bytes < kLine) {
#pragma GCC unroll 16
        for (int lane = 0; lane < n_lanes; ++lane) store(reinterpret_cast<float*>(square[lane]), lanes[lane]);
        for (int64_t lane = 0; lane < smaller<int64_t>(rows - i, n_lanes); ++lane)
          __builtin_memcpy(to + lane * step, square[lane], bytes);
        continue;
      }
#pragma GCC unroll 16
      for (int lane = 0; lane < n_lanes; ++lane) {
        if (i + lane >= rows) continue;
        _mm512_storeu_si512(to + lane * step, (__m512i)lanes[lane]);
      }
    }
  }
}

struct AmxSoftmaxWeights {
  using Shared = AmxPanel<BFloat16>::Shared;
  using Softmax = OnlineSoftmax<VectorMath<float>>;
  static constexpr int64_t kPanels = kTaskRows / kAmxLanes, kKeys = AmxPanel<BFloat16>::kKeys;

  const AttentionProblem& p;
  const SoftmaxOutputs& outputs;
  const Shared& shared;
  int64_t row_blocks, head_pairs, heads_at_once, value_columns;

  AmxSoftmaxWeights(const AttentionProblem& problem, const SoftmaxOutputs& out, const Shared& state)
      : p(problem),
        outputs(out),
        shared(state),
        row_blocks((p.query_length + kTaskRows - 1) / kTaskRows),
        // Heads lie an odd number of lines apart, so that they do not share sets of the L1 cache.
        head_pairs(kTaskRows * shared.blocks * kKeys + kLine / 2),
        heads_at_once(smaller(larger<int64_t>(kMostPairs / head_pairs, 1),
                              outputs.mean ? smaller(kHeadsAtOnce, p.heads) : int64_t{1})),
        value_columns(outputs.out.defined() ? round_up(p.value_dim, kTileSide) : 0) {}
  int64_t map_heads() const { return outputs.mean ? 1 : p.heads; }
  int64_t items() const { return p.batch * map_heads() * row_blocks; }

  struct Task {
    TileScratch<float> tile;
    int64_t batch = 0, row = 0, rows = 0;
    int64_t first_block = 0, last_block = 0;  // of keys that any row attends
    uint16_t *query, *row_memory;             // B operands: [panel][head_dim / 2][lane][2]
    float *scores, *out, *out_rows;           // [key][lane]; [panel][column][lane]
    float *maximum, *factor;                  // [head of the group][lane]
    float *sum, *old_maximum, *rescale, *ones, *factors;
    float* subtracted;  // [head of the group][block][lane]: from a block's scores
    uint16_t* pairs;    // [head of the group][panel][key / 2][lane][2]
    float* sums;        // [panel][key][lane]: of the groups before

    Task(const AttentionProblem& p, Scratch& scratch) : tile(p, scratch) {}
  };

  void run(int64_t item, Scratch& scratch) const {
    const TileSession session;
    Task task(p, scratch);
    task.batch = item / (map_heads() * row_blocks);
    task.row = (row_blocks - 1 - item % row_blocks) * kTaskRows;
    const int64_t first_head = item / row_blocks % map_heads(), heads = outputs.mean ? p.heads : 1;
    task.rows = smaller(kTaskRows, p.query_length - task.row);
    const KeyRange range = band_mask_of_selected_rows(p, task.batch).keys_of_any(task.row, task.row + task.rows);
    if (!range.empty()) {
      task.first_block = range.begin / kKeys;
      task.last_block = (range.end + kKeys - 1) / kKeys;
    }
    zero_columns(outputs.weights, task.batch, first_head, task.row, task.rows, 0, task.first_block * kKeys);
    zero_columns(outputs.weights, task.batch, first_head, task.row, task.rows, task.last_block * kKeys, p.key_length);
    take_memory(task, scratch, heads);
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t slot = i % heads_at_once;
      attend(task, first_head + i, slot);
      const bool last = i + 1 == heads;
      if (slot + 1 == heads_at_once || last) finish_group(task, first_head, slot + 1, i < heads_at_once, last);
    }
  }

  void take_memory(Task& task, Scratch& scratch, int64_t heads) const {
    task.query = scratch.take<uint16_t>(kTaskRows * shared.key_columns);
    task.row_memory = scratch.take<uint16_t>(kTaskRows * shared.key_columns);
    task.scores = scratch.take<float>(kKeys * kAmxLanes);
    task.out = scratch.take<float>(kTaskRows * value_columns);
    task.out_rows = scratch.take<float>(kAmxLanes * value_columns);
    for (float** array : {&task.maximum, &task.factor}) *array = scratch.take<float>(heads_at_once * kTaskRows);
    task.sum = scratch.take<float>(kTaskRows);
    for (float** array : {&task.old_maximum, &task.rescale, &task.ones}) *array = scratch.take<float>(kAmxLanes);
    fill<float>(task.ones, 1, kAmxLanes);
    task.factors = scratch.take<float>(heads_at_once * kAmxLanes);
    task.subtracted = scratch.take<float>(heads_at_once * shared.blocks * kTaskRows);
    task.pairs = scratch.take<uint16_t>(heads_at_once * head_pairs);
    task.sums = scratch.take<float>(heads_at_once < heads ? kTaskRows * shared.blocks * kKeys : 0);
  }

  static int64_t panel_rows(const Task& task, int64_t panel) {
    return smaller<int64_t>(kAmxLanes, task.rows - panel * kAmxLanes);
  }
  // Where a panel's values with a block of keys start, in [panel][key][lane].
  int64_t place(int64_t panel, int64_t block) const { return (panel * shared.blocks + block) * kKeys * kAmxLanes; }

  // One head: its output and logsumexp, and its weights, up to a factor, in the group's pairs.
  TA_NOINLINE void attend(const Task& task, int64_t head, int64_t slot) const {
    const ScoreStage<float> stage(p, task.batch, head);
    const HalfRows rows = half_rows(p.query, task.batch, head, task.row, task.rows, p.head_dim, task.rows,
                                    shared.key_columns, task.row_memory);
    float *maximum = task.maximum + slot * kTaskRows, *factor = task.factor + slot * kTaskRows;
    const float lowest = -__builtin_inff();
    float sink = lowest;
    if (p.sinks.defined()) sink = head_number<float>(p.sinks, task.batch, head);
    fill<float>(maximum, sink, kTaskRows);
    fill<float>(task.sum, sink == lowest ? 0 : 1, kTaskRows);
    fill<float>(task.out, 0, kTaskRows * value_columns);
    for (int64_t panel = 0; panel * kAmxLanes < task.rows; ++panel) {
      const int64_t offset = panel * kAmxLanes;
      pack_pairs(task.query + offset * shared.key_columns, kAmxLanes, {rows.data + offset * rows.stride, rows.stride},
                 panel_rows(task, panel), shared.key_columns);
    }
    for (int64_t block = task.first_block; block < task.last_block; ++block) {
      for (int64_t panel = 0; panel * kAmxLanes < task.rows; ++panel) add_keys(task, stage, head, slot, panel, block);
    }
    for (int64_t i = 0; i < kTaskRows; i += kLanes<float>) {
      const Vec<float> sum = load(task.sum + i);
      store(factor + i, Softmax::inverse_sum(sum));
      store(task.sum + i, Softmax::logsumexp(load(maximum + i), sum));
    }
    if (outputs.computed_logsumexp != nullptr) {
      __builtin_memcpy(static_cast<float*>(outputs.computed_logsumexp) + p.first_row(task.batch, head) + task.row,
                       task.sum, task.rows * sizeof(float));
    }
    for (int64_t panel = 0; outputs.out.defined() && panel * kAmxLanes < task.rows; ++panel) {
      const int64_t offset = panel * kAmxLanes;
      store_panel(outputs.out, task.batch, head, task.row + offset, panel_rows(task, panel), p.value_dim,
                  task.out + offset * value_columns, kAmxLanes, factor + offset, task.out_rows);
    }
  }

  // One panel with one block of keys.
  TA_NOINLINE void add_keys(const Task& task, const ScoreStage<float>& stage, int64_t head, int64_t slot, int64_t panel,
                            int64_t block) const {
    const int64_t offset = panel * kAmxLanes, row = task.row + offset, rows = panel_rows(task, panel);
    const int64_t key = block * kKeys, all_keys = round_up(smaller(kKeys, p.key_length - key), kTileDepth);
    float *maximum = task.maximum + slot * kTaskRows + offset, *sum = task.sum + offset;
    float* subtracted = task.subtracted + (slot * shared.blocks + block) * kTaskRows + offset;
    uint16_t* pairs = task.pairs + slot * head_pairs + place(panel, block);
    const KeySpan span = KeySpan::of(stage.band, row, rows, key, all_keys, kTileDepth);
    BiasTile<float> bias;
    if (span.empty() || !load_bias<float, kAmxVectors>(stage, task.tile, row, rows, key, span, bias)) {
      fill<uint16_t>(pairs, 0, all_keys * kAmxLanes);
      __builtin_memcpy(subtracted, maximum, kAmxLanes * sizeof(float));
      return;
    }
    fill<uint16_t>(pairs, 0, span.begin * kAmxLanes);
    fill<uint16_t>(pairs + span.end * kAmxLanes, 0, (all_keys - span.end) * kAmxLanes);

    const int64_t shared_block = shared.block(p, task.batch, head, key);
    const uint16_t* keys = shared.keys + shared_block * kKeys * shared.key_columns;
    Ahead next_keys = ahead(keys + kKeys * shared.key_columns, shared.key_columns, panel);
    const TileOperand query_operand{task.query + offset * shared.key_columns, kAmxLanes * 4,
                                    kTileDepth / 2 * kAmxLanes * 4};
    for (int64_t j = span.begin; j < span.end; j += kTileDepth) {
      const TileOperand key_operand{keys + j * shared.key_columns, shared.key_columns * 2, kTileDepth * 2};
      tile_product<false>(kTileDepth / kTileSide, kAmxVectors, shared.key_columns / kTileDepth, key_operand,
                          query_operand, task.scores + j * kAmxLanes, kAmxLanes);
      next_keys.ask();
    }

    __builtin_memcpy(task.old_maximum, maximum, kAmxLanes * sizeof(float));
    float factor = stage.dot_factor();
    if (stage.changes_elements(bias) || span.has_edges() || !(factor > 0)) {
      modify_scores<float, kAmxVectors>(stage, bias, span.has_edges(), row, key, span.begin, span.end, factor,
                                        task.scores, nullptr, maximum);
      factor = 1;
    } else {
      raise_maximum(span.begin, span.end, factor, task.scores, maximum);
    }
    prefetch_next_bias(stage.mask_rows, task.row, task.rows, offset, kAmxLanes, key, all_keys);
    const uint32_t rescaled = settle_maximum<BFloat16>(task.old_maximum, maximum, task.rescale);
    __builtin_memcpy(subtracted, maximum, kAmxLanes * sizeof(float));

    const bool with_output = outputs.out.defined();
    const uint16_t* values = with_output ? shared.values + shared_block * kKeys * shared.value_columns : nullptr;
    Ahead next_values = with_output ? ahead(values + kKeys * shared.value_columns, shared.value_columns, panel)
                                    : Ahead{nullptr, nullptr};
    for (int64_t j = span.begin; j < span.end; j += kTileSide) {
      SoftmaxPairs<BFloat16, false>(j, j + kTileSide, factor, task.scores, nullptr, maximum, pairs + j * kAmxLanes)
          .finish(j == span.begin ? task.rescale : task.ones, sum);
      next_values.ask();
    }
    if (!with_output) return;
    float* out = task.out + offset * value_columns;
    if (rescaled != 0) rescale_output(rescaled, task.rescale, value_columns, out);
    const TileOperand value_operand{values + span.begin, kKeys * 2, kTileDepth * 2};
    const TileOperand weight_operand{pairs + span.begin * kAmxLanes, kAmxLanes * 4, kTileDepth / 2 * kAmxLanes * 4};
    tile_product<true>(value_columns / kTileSide, kAmxVectors, (span.end - span.begin) / kTileDepth, value_operand,
                       weight_operand, out, kAmxLanes);
  }

  // A panel's share of a block of rows.
  static Ahead ahead(const uint16_t* block, int64_t columns, int64_t panel) {
    const int64_t share = kKeys * columns * static_cast<int64_t>(sizeof(uint16_t)) / kPanels;
    const char* first = reinterpret_cast<const char*>(block) + panel * share;
    return {first, first + share};
  }

  // The weights of the group's heads join the sums or, with the last group, are written. A map of all heads has groups
  // of one.
  TA_NOINLINE void finish_group(const Task& task, int64_t map_head, int64_t heads, bool first, bool last) const {
    const float share = outputs.mean ? 1.0f / static_cast<float>(p.heads) : 1.0f;
    for (int64_t panel = 0; panel * kAmxLanes < task.rows; ++panel) {
      const int64_t offset = panel * kAmxLanes;
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        for (int64_t i = 0; i < heads * kAmxLanes; i += kLanes<float>) {
          const int64_t slot = i / kAmxLanes, lane = offset + i % kAmxLanes;
          const Vec<float> used = load(task.subtracted + (slot * shared.blocks + block) * kTaskRows + lane);
          const Vec<float> correction = Softmax::rescale(used, load(task.maximum + slot * kTaskRows + lane));
          store(task.factors + i, correction * load(task.factor + slot * kTaskRows + lane) * share);
        }
        const int64_t key = block * kKeys, keys = smaller(kKeys, p.key_length - key), at = place(panel, block);
        const PairedHeads group{heads, task.pairs + at, head_pairs, task.factors};
        if (last) {
          char* columns = element(outputs.weights, task.batch, map_head, task.row + offset) + key * 2;
          write_heads(group, keys, first ? nullptr : task.sums + at, outputs.weights, columns, panel_rows(task, panel));
        } else if (first) {
          add_heads<true>(group, round_up(keys, kTileDepth), task.sums + at);
        } else {
          add_heads<false>(group, round_up(keys, kTileDepth), task.sums + at);
        }
      }
    }
  }
};

TA_INLINE void softmax_weights(const AttentionProblem& problem, const SoftmaxOutputs& outputs,
                               const Parallel& parallel) {
  Scratch scratch;
  const AmxPanel<BFloat16>::Shared shared(problem, outputs.out.defined(), parallel, scratch);
  const AmxSoftmaxWeights kernel(problem, outputs, shared);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& memory) { kernel.run(item, memory); });
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
