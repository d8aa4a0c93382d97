// The operands of backward.cuh, in shared memory, and the warpgroup that brings them there.
#pragma once

#include "../launch.h"
#include "../ptx_sm90.cuh"
#include "../sm80/gradient_steps.cuh"
#include "operand.cuh"

namespace torch_attn::cuda::sm90 {

using sm80::RowSteps;

// On an H200, bfloat16, full attention of length 4096: with the scores of the next step (kEarlyScores) before the
// barrier 539 in place of 536 TFLOP/s at 128 columns, 426 in place of 442 at 64.
template <int kDim>
struct BackwardShape {
  static constexpr int kWarpgroups = 2;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup, kKeys = kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = kConsumers + kWarpgroup;  // the last warpgroup copies
  // Of a step's query rows. Its scores and their gradients take kRows of a thread's registers, the gradients of keys
  // and values kDim.
  static constexpr int kRows = kDim <= 64 ? 128 : 64;
  static constexpr int kStages = 3;  // steps whose rows are in shared memory or on their way there
  static constexpr bool kEarlyScores = kDim > 64;

  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kBlockRegisters = (1 << 16) / kThreads / 8 * 8 * kThreads;  // by __launch_bounds__(kThreads, 1)
  static_assert(kConsumers * kConsumerRegisters + kWarpgroup * kProducerRegisters <= kBlockRegisters,
                "else warpgroups wait for registers for ever");

  TA_DEVICE static int next_stage(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }
  TA_DEVICE static int last_stage(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
};

template <class T, int kDim>
struct BackwardShared {
  using Shape = BackwardShape<kDim>;
  struct Stage {
    Operand<T, Shape::kRows, kDim> query, grad_out;
  };
  struct RowValues {
    float shift[Shape::kRows], delta[Shape::kRows];  // see weight_shift
  };
  Operand<T, Shape::kKeys, kDim> key, value;
  Stage stage[Shape::kStages];
  Operand<T, Shape::kKeys, Shape::kRows> grad_score[2];  // a row is a key
  RowValues rows[Shape::kStages];
  uint64_t full[Shape::kStages], empty[Shape::kStages];  // mbarriers
};

// A weight is 2^(q·k · factor − shift): BackwardRow::plain_weight, with its scale in the exponent. One that is not 1
// belongs to a large logsumexp; then what rounding takes from the product counts, too.
TA_DEVICE float weight_shift(float logsumexp, float scale) {
  constexpr float kRestOfLog2E = 1.92596299e-8f;
  const float shift = logsumexp * kLog2E;
  if (scale == 1) return shift;
  return shift + (fmaf(logsumexp, kLog2E, -shift) + logsumexp * kRestOfLog2E - Math<float>::log(scale) * kLog2E);
}

// The last warpgroup's work: keys and values with the first step's rows, then each step's as soon as a stage is empty.
// Registers are few: what can be asked for anew is not kept.
template <class T, int kDim>
TA_DEVICE void bring_steps(BackwardShared<T, kDim>& shared, const AttentionProblem& p, const BackwardTensors& t,
                           const RowStatistics<float>& statistics, int batch, int kv_head, int first) {
  using Shape = BackwardShape<kDim>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys;
  const int copier = static_cast<int>(threadIdx.x) % kWarpgroup;
  int stage = 0, parity = 1;
  RowSteps<kRows> step(p, batch, kv_head, first, kKeys);
  if (!step.done()) {
    shared.key.template copy<kWarpgroup>(
        Rows<T>(p.key, batch, kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch)), first);
    shared.value.template copy<kWarpgroup>(
        Rows<T>(p.value, batch, kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch)), first);
  }
  for (; !step.done(); step.advance()) {
    ptx::mbarrier_wait(shared.empty + stage, parity);
    const int64_t queries = p.queries_of(batch), first_query = p.first_query(batch);
    shared.stage[stage].query.template copy<kWarpgroup>(
        Rows<T>(p.query, batch, step.head, queries, p.head_dim, first_query), step.row);
    shared.stage[stage].grad_out.template copy<kWarpgroup>(
        Rows<T>(t.grad_out, batch, step.head, queries, p.value_dim, first_query), step.row);
    if (copier < kRows) {
      auto& rows = shared.rows[stage];
      const bool valid = step.row + copier < queries;
      const int64_t from = valid ? p.first_row(batch, step.head) + step.row + copier : 0;
      rows.shift[copier] =
          valid ? weight_shift(static_cast<const float*>(t.logsumexp)[from], statistics.weight_scale[from]) : 0;
      rows.delta[copier] = valid ? statistics.delta[from] : 0;
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_shared_for_wgmma();
    ptx::mbarrier_arrive(shared.full + stage);
    stage = Shape::next_stage(stage);
    if (stage == 0) parity ^= 1;
  }
}

}  // namespace torch_attn::cuda::sm90
