// Attention's output and weights of numbers in pieces where logsumexp is yet to be found: what MultiheadAttention calls
// for need_weights=True. A task is some rows of one head or, for the mean, of all heads in turn. It walks over the keys
// as forward.h does, but its tiles keep their weights: these wait until the row's sum is known, and then join the mean,
// beside the next head's products, or are written. Included by map_kernels.h.
#pragma once

#include "forward_stages.h"
#include "mean_beside.h"
#include "weights.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// Rows of a task, each of which reads all keys and values of its heads, from beyond the L2 cache. For the mean 64 rows
// are 4 to 20 % slower, 128 and 256 up to 4 %. Of very long sequences fewer rows' weights wait, of so many bytes.
constexpr int64_t kJointRows = 6 * kAmxLanes;
constexpr int64_t kMostWaiting = int64_t{1} << 23;

template <class Stored>
struct JointWeights {
  using Panel = AmxPanel<Stored>;
  using Shared = typename Panel::Shared;
  using Softmax = OnlineSoftmax<VectorMath<float>>;
  static constexpr int64_t kKeys = Panel::kKeys;

  const AttentionProblem& p;
  const SoftmaxOutputs& outputs;
  const Shared& shared;
  ForwardStages<Stored, true> forward;
  int64_t task_rows, row_blocks;

  JointWeights(const AttentionProblem& problem, const SoftmaxOutputs& out, const ForwardOutputs& forward_out,
               const AttendedBits& attended, const Shared& state, int threads)
      : p(problem), outputs(out), shared(state), forward(problem, forward_out, attended, &state.infinite) {
    const int64_t row_bytes = shared.blocks * kKeys * static_cast<int64_t>(sizeof(float));
    int64_t most = larger(kAmxLanes, smaller(kJointRows, round_down(kMostWaiting / row_bytes, kAmxLanes)));
    const auto blocks_of = [&](int64_t rows) { return (p.query_length + rows - 1) / rows; };
    while (most > 2 * kAmxLanes && p.batch * map_heads() * blocks_of(most) < 4 * threads) most -= kAmxLanes;
    task_rows = round_up((p.query_length + blocks_of(most) - 1) / blocks_of(most), kAmxLanes);
    row_blocks = blocks_of(task_rows);
  }
  int64_t map_heads() const { return outputs.mean ? 1 : p.heads; }
  int64_t items() const { return p.batch * map_heads() * row_blocks; }

  // What makes weights of one head's: what was subtracted from the scores, [block][lane], how far it rose, and what
  // remains to be multiplied by, [lane].
  struct Head {
    float *subtracted, *maximum, *factor;
  };
  struct Task {
    ForwardRows block;
    int64_t first_block = 0, last_block = 0;  // of keys that any row attends
    float *weights, *sums;                    // [panel][key][lane]: of a head, and of all heads before it
    Head heads[2];                            // by a head's number, even or odd
    float* bias;                              // of a block of keys

    int64_t panels() const { return block.lanes / kAmxLanes; }
    int64_t blocks() const { return last_block - first_block; }
    // Where a panel's weights with a block of keys start.
    int64_t place(int64_t panel, int64_t key_block) const {
      return (panel * blocks() + key_block - first_block) * kKeys * kAmxLanes;
    }
  };

  void run(int64_t item, Scratch& scratch) const {
    const TileSession session;
    WaitingSums sums;
    Task task;
    ForwardRows& block = task.block;
    block.sums = &sums;
    block.batch = item / (map_heads() * row_blocks);
    block.row = (row_blocks - 1 - item % row_blocks) * task_rows;  // with a causal mask, long rows first
    block.rows = smaller(task_rows, p.query_length - block.row);
    block.lanes = round_up(block.rows, kAmxLanes);
    const int64_t first_head = item / row_blocks % map_heads(), heads = outputs.mean ? p.heads : 1;
    const KeyRange range = band_mask_of_selected_rows(p, block.batch).keys_of_any(block.row, block.row + block.rows);
    if (!range.empty()) {
      task.first_block = range.begin / kKeys;
      task.last_block = (range.end + kKeys - 1) / kKeys;
    }
    zero_columns(outputs.weights, block.batch, first_head, block.row, block.rows, 0, task.first_block * kKeys);
    zero_columns(outputs.weights, block.batch, first_head, block.row, block.rows, task.last_block * kKeys,
                 p.key_length);
    take_memory(task, scratch, heads);
    for (int64_t i = 0; i < heads; ++i) {
      block.head = first_head + i;
      // A tile of 64 keys and 64 columns has 4 steps.
      if (forward.value_dim <= 64) {
        attend<32>(task, i, i + 1 == heads);
      } else if (forward.value_dim <= 128) {
        attend<16>(task, i, i + 1 == heads);
      } else {
        attend<8>(task, i, i + 1 == heads);
      }
    }
    write(task, first_head, heads - 1);
  }

  void take_memory(Task& task, Scratch& scratch, int64_t heads) const {
    forward.take_memory(task.block, scratch);
    const int64_t lanes = task.block.lanes, size = task.blocks() * kKeys * lanes;
    task.weights = scratch.take<float>(size);
    task.sums = scratch.take<float>(heads > 1 ? size : 0);
    for (Head& head : task.heads) {
      head.subtracted = scratch.take<float>(task.blocks() * lanes);
      for (float** array : {&head.maximum, &head.factor}) *array = scratch.take<float>(lanes);
    }
    task.bias = scratch.take<float>(p.attn_mask.defined() ? kKeys : 0);
  }

  // One head: its output and logsumexp, and its weights, up to a factor. Meanwhile those of the head before join the
  // sums, each tile before this head's takes its place.
  template <int kParts>
  TA_NOINLINE void attend(const Task& task, int64_t number, bool is_last) const {
    const ForwardRows& block = task.block;
    const Head &head = task.heads[number % 2], &before = task.heads[(number + 1) % 2];
    const ScoreStage<float> stage(p, block.batch, block.head);
    const int64_t panels = task.panels(), tiles = panels * task.blocks();
    for (int64_t panel = 0; panel < panels; ++panel) forward.start(block, panel);
    const auto beside_of = [&](int64_t tile, const BlockAhead& ahead) TA_INLINE_LAMBDA {
      if (number == 0 || tile >= tiles) return MeanBeside<kParts>(ahead);
      const int64_t panel = tile % panels, key_block = task.first_block + tile / panels;
      return MeanBeside<kParts>(ahead, waiting_weights(task, before, panel, key_block), kKeys, number == 1,
                                task.sums + task.place(panel, key_block));
    };
    const int64_t next_head = is_last ? block.head : block.head + 1;
    beside_of(0, block_ahead(shared.block(p, block.batch, block.head, task.first_block * kKeys), 0, panels)).finish();

    ForwardKeys keys[2];  // of the tiles
    ForwardTile memory[2];
    memory[0].keys = &keys[0], memory[1].keys = &keys[1];
    int now = 0;
    const ForwardTile* waiting = nullptr;
    for (int64_t i = task.first_block, tile = 0; i < task.last_block; ++i) {
      ForwardKeys key_block{};
      const bool attends = load_keys(task, stage, i, key_block);
      const bool is_last_block = i + 1 == task.last_block;
      const int64_t next = shared.block(p, block.batch, is_last_block ? next_head : block.head,
                                        (is_last_block ? task.first_block : i + 1) * kKeys);
      for (int64_t panel = 0; panel < panels; ++panel) {
        ForwardTile& scores = memory[now];
        keys[now] = key_block;
        scores.offset = panel * kAmxLanes;
        scores.scores = task.weights + task.place(panel, i);
        scores.words = nullptr;
        scores.next_mask = nullptr;
        auto beside = beside_of(++tile, block_ahead(next, panel, panels));
        RowsAhead nothing;
        const bool adds = attends && forward.add_scores(block, scores, waiting, stage, nothing, &beside);
        beside.finish();
        const KeySpan span = adds ? scores.span : KeySpan{};
        fill<float>(scores.scores, 0, span.begin * kAmxLanes);
        fill<float>(scores.scores + span.end * kAmxLanes, 0, (kKeys - span.end) * kAmxLanes);
        __builtin_memcpy(head.subtracted + (i - task.first_block) * block.lanes + scores.offset,
                         block.maximum + scores.offset, kAmxLanes * sizeof(float));
        if (adds) waiting = &scores, now = 1 - now;
      }
    }
    if (waiting != nullptr) forward.add_values(block, *waiting);
    __builtin_memcpy(head.maximum, block.maximum, block.lanes * sizeof(float));
    for (int64_t panel = 0; panel < panels; ++panel) forward.finish(block, panel);
    __builtin_memcpy(head.factor, block.sum, block.lanes * sizeof(float));
  }

  // False where a mask excludes all of the block's keys.
  bool load_keys(const Task& task, const ScoreStage<float>& stage, int64_t number, ForwardKeys& keys) const {
    keys.key = number * kKeys, keys.keys = smaller(kKeys, p.key_length - keys.key);
    keys.all_keys = round_up(keys.keys, kTileDepth);
    const int64_t shared_block = shared.block(p, task.block.batch, task.block.head, keys.key);
    keys.key_rows = shared.keys_of(shared_block);
    keys.value_columns = shared.values_of(shared_block);
    return !stage.mask_is_per_key() || load_bias_per_key(stage.mask_rows, keys.key, keys.keys, task.bias, keys.bias);
  }

  // A panel's share of a block of keys and values.
  BlockAhead block_ahead(int64_t block, int64_t panel, int64_t panels) const {
    const int64_t size = Panel::kPieces * kKeys * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t key_bytes = size * shared.key_columns, value_bytes = size * shared.value_columns;
    const char* keys = reinterpret_cast<const char*>(shared.keys) + block * key_bytes;
    const char* values = reinterpret_cast<const char*>(shared.values) + block * value_bytes;
    return BlockAhead(keys, key_bytes, values, value_bytes, panel, panels);
  }

  // A head's weights of one panel and block, whose maximum may have risen since.
  WaitingWeights waiting_weights(const Task& task, const Head& head, int64_t panel, int64_t block) const {
    const float share = outputs.mean ? 1.0f / static_cast<float>(p.heads) : 1.0f;
    WaitingWeights waiting{task.weights + task.place(panel, block), {}};
#pragma GCC unroll 2
    for (int n = 0; n < kAmxVectors; ++n) {
      const int64_t lane = panel * kAmxLanes + n * kLanes<float>;
      const Vec<float> used = load(head.subtracted + (block - task.first_block) * task.block.lanes + lane);
      waiting.factor[n] = Softmax::rescale(used, load(head.maximum + lane)) * load(head.factor + lane) * share;
    }
    return waiting;
  }

  // The weights of the head that waits, and the sums of those before it.
  TA_NOINLINE void write(const Task& task, int64_t map_head, int64_t number) const {
    const ForwardRows& rows = task.block;
    for (int64_t panel = 0; panel < task.panels(); ++panel) {
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        const int64_t key = block * kKeys, keys = smaller(kKeys, p.key_length - key);
        const WaitingWeights waiting = waiting_weights(task, task.heads[number % 2], panel, block);
        const float* sums = number == 0 ? nullptr : task.sums + task.place(panel, block);
        char* columns = element(outputs.weights, rows.batch, map_head, rows.row + panel * kAmxLanes);
        write_weights<Stored>(waiting, keys, sums, outputs.weights,
                              columns + key * static_cast<int64_t>(sizeof(Stored)), forward.rows_of(rows, panel));
      }
    }
  }
};

// False where tile products cannot serve some number: output and weights are then undefined.
template <class Stored>
bool joint_weights(const AttentionProblem& problem, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  Scratch scratch;
  const typename AmxPanel<Stored>::Shared shared(problem, true, parallel, scratch);
  const AttendedBits attended(problem, parallel);
  const ForwardOutputs forward_outputs{outputs.out, outputs.computed_logsumexp};
  const JointWeights<Stored> kernel(problem, outputs, forward_outputs, attended, shared, parallel.threads);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& memory) { kernel.run(item, memory); });
  return !shared.infinite;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
