// The operands of forward.cuh, in shared memory, and the warpgroup that brings them there.
#pragma once

#include "../launch.h"
#include "../ptx_sm90.cuh"
#include "block_order.h"
#include "operand.cuh"

namespace torch_attn::cuda::sm90 {

// On an H200, bfloat16, full attention of length 4096 in TFLOP/s. At 64 columns (32 heads) 454 so, with three
// warpgroups and 128 keys 426, with two 400. At 128 columns (8 heads) 617 so, with 176 keys and two stages 575, with 96
// keys 604. Products that are not issued in turn: 436 and 606.
template <int kDim>
struct ForwardShape {
  static constexpr int kLog2Warpgroups = kDim <= 64 ? 2 : 1, kWarpgroups = 1 << kLog2Warpgroups;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;  // the last warpgroup copies
  // Of a step. Its scores take kKeys / 2 of a thread's registers, its weights kKeys / 4, the output kDim / 2.
  static constexpr int kKeys = kDim <= 64 ? 64 : 128;
  static constexpr int kStages = kDim <= 64 ? 8 : 3;  // steps whose keys are in shared memory or on their way there
  // Steps that are under way beside the one that is waited for. Warpgroups that share rows at 64 columns want 28 KB of
  // keys and values a microsecond; with one tile of 8 KB beside another there came 19.
  static constexpr int kAhead = kDim <= 64 ? 3 : 1;
  static constexpr double kTraffic = kDim <= 64 ? 0.3 : 0.83;  // on an H200, see ForwardBlocks

  static constexpr int kConsumerRegisters = kDim <= 64 ? 112 : 232, kProducerRegisters = kDim <= 64 ? 32 : 40;
  static constexpr int kBlockRegisters = (1 << 16) / kThreads / 8 * 8 * kThreads;  // by __launch_bounds__(kThreads, 1)
  static_assert(kConsumers * kConsumerRegisters + kWarpgroup * kProducerRegisters <= kBlockRegisters,
                "else warpgroups wait for registers for ever");
};

template <class T, int kDim>
struct ForwardShared {
  using Shape = ForwardShape<kDim>;
  Operand<T, kWarpgroupRows, kDim> query[Shape::kWarpgroups];
  Operand<T, Shape::kKeys, kDim> key[Shape::kStages], value[Shape::kStages];
  // mbarriers. A step's keys come with the values of the one before, and with the queries if it is the first.
  uint64_t full[Shape::kStages], empty_key[Shape::kStages], empty_value[Shape::kStages];
};

// A block's rows, of `groups` warpgroups, and the steps of keys that these attend.
template <int kDim>
struct ForwardBlock {
  int batch, head, row, begin, steps;

  TA_DEVICE ForwardBlock(const AttentionProblem& p, const BlockOrder& order, int groups) {
    constexpr int kKeys = ForwardShape<kDim>::kKeys;
    const BlockOrder::Place place = order.place_of(static_cast<int>(blockIdx.x));
    const int rows = groups * kWarpgroupRows;
    batch = place.batch;
    head = place.head;
    row = (order.tiles - 1 - place.tile) * rows;
    const int queries = static_cast<int>(p.queries_of(batch));
    const KeyRange range =
        HeadScore<float>(p, batch, 0).band.keys_of_any(row, row + rows < queries ? row + rows : queries);
    begin = static_cast<int>(range.begin / kKeys * kKeys);
    steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kKeys));
  }
};

// One stage after another, each once in a phase of its mbarriers.
template <int kStages>
struct StageRing {
  int stage, parity;

  TA_DEVICE void advance(int steps = 1) {
    stage += steps;
    if (stage < kStages) return;
    stage -= kStages;
    parity ^= 1;
  }
};

// Tells consumers of copies that have landed: while others are under way, or when there is nothing else to be done.
template <class Shape>
struct Arrivals {
  uint64_t* const full;
  StageRing<Shape::kStages> oldest{0, 0};  // of those that are under way
  int count = 0;

  TA_DEVICE void add() {
    ptx::cp_async_commit();
    if (++count > Shape::kAhead) announce<Shape::kAhead>();
  }
  // All but so many.
  template <int kLeft>
  TA_DEVICE void announce() {
    ptx::cp_async_wait<kLeft>();
    ptx::fence_shared_for_wgmma();
    for (; count > kLeft; --count, oldest.advance()) ptx::mbarrier_arrive(full + oldest.stage);
  }
  // Until a stage is empty. Those who will leave it may need what is under way.
  TA_DEVICE void wait_for(uint64_t* empty, int parity) {
    if (count > 0 && !ptx::mbarrier_test(empty, parity)) announce<0>();
    ptx::mbarrier_wait(empty, parity);
  }
};

// The last warpgroup's work. Registers are few: what can be asked for anew is not kept.
template <class T, int kDim>
TA_DEVICE void bring_keys(ForwardShared<T, kDim>& shared, const AttentionProblem& p, const ForwardBlock<kDim>& block,
                          int groups) {
  using Shape = ForwardShape<kDim>;
  constexpr int kKeys = Shape::kKeys;
  if (block.steps == 0) return;
  const int batch = block.batch;
  const int kv_head = block.head * static_cast<int>(p.kv_heads) / static_cast<int>(p.heads);
  for (int group = 0; group < groups; ++group)
    shared.query[group].template copy<kWarpgroup>(
        Rows<T>(p.query, batch, block.head, p.queries_of(batch), p.head_dim, p.first_query(batch)),
        block.row + group * kWarpgroupRows);
  Arrivals<Shape> arrivals{shared.full};
  StageRing<Shape::kStages> keys{0, 1}, values{0, 1};
  for (int step = 0; step <= block.steps; ++step) {
    const int64_t count = p.keys_of(batch), first = p.first_key(batch);
    arrivals.wait_for(shared.empty_key + keys.stage, keys.parity);
    if (step < block.steps)
      shared.key[keys.stage].template copy<kWarpgroup>(Rows<T>(p.key, batch, kv_head, count, p.head_dim, first),
                                                       block.begin + step * kKeys);
    keys.advance();
    if (step > 0) {
      arrivals.wait_for(shared.empty_value + values.stage, values.parity);
      shared.value[values.stage].template copy<kWarpgroup>(Rows<T>(p.value, batch, kv_head, count, p.value_dim, first),
                                                           block.begin + (step - 1) * kKeys);
      values.advance();
    }
    arrivals.add();
  }
  arrivals.template announce<0>();
}

}  // namespace torch_attn::cuda::sm90
