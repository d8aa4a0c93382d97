// The forward pass on Hopper for short or few sequences of up to 64 columns, which forward.cuh's blocks of 256 rows
// would leave most of the GPU to wait for: one block of a single warpgroup per 64 query rows, two on a multiprocessor,
// each of which copies its own keys and values. While a step's softmax is computed, the tensor cores are at the last
// step's output.
#pragma once

#include "../launch.h"
#include "operand.cuh"

namespace torch_attn::cuda::sm90 {

using sm80::lane_index;
using sm80::row_max;
using sm80::row_sum;
using sm80::TileRange;

// Registers bound the keys of a step: its scores take kKeys / 2 of a thread's 255, its weights kKeys / 4.
struct ShortForwardShape {
  static constexpr int kDim = 64, kKeys = 128;
  static constexpr int kStages = 3;  // steps whose keys and values are in shared memory or on their way there
  static constexpr int kBlocks = 2;  // of a multiprocessor
  static constexpr int kThreads = kWarpgroup, kRows = kWarpgroupRows;

  // Whether a call is left to it. On an H200, full attention, against forward.cuh: B 1, H 8, L 2048 1.1x, B 8, H 12,
  // L 128 1.36x; B 1, H 8, L 4096, with 128 blocks of 256 rows, 0.85x.
  static bool suits(const AttentionProblem& p, int multiprocessors) {
    return 10 * (p.batch * p.heads * (p.query_length / 256)) < 9 * int64_t{multiprocessors};
  }
};

template <class T, int kDim>
struct ShortForwardShared {
  using Shape = ShortForwardShape;
  static_assert(kDim == Shape::kDim, "");
  Operand<T, Shape::kRows, kDim> query;
  Operand<T, Shape::kKeys, kDim> key[Shape::kStages], value[Shape::kStages];
};

template <class T, int kDim>
__global__ void __launch_bounds__(ShortForwardShape::kThreads, ShortForwardShape::kBlocks)
    short_forward_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out) {
#if TA_HAS_WGMMA
  using Shape = ShortForwardShape;
  using Softmax = OnlineSoftmax<Math<float>>;
  constexpr int kKeys = Shape::kKeys, kGroups = kKeys / 8, kStages = Shape::kStages, kRows = Shape::kRows;
  const T type{};
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ShortForwardShared<T, kDim>*>(memory);

  const int tiles = static_cast<int>(ceil_div(p.query_length, kRows));
  const int index = static_cast<int>(blockIdx.x), heads = static_cast<int>(p.heads);
  const int row = (tiles - 1 - index % tiles) * kRows;  // the longest rows of a causal mask first
  const int head = index / tiles % heads, batch = index / tiles / heads;
  const int queries = static_cast<int>(p.queries_of(batch));
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int row_end = row + kRows < queries ? row + kRows : queries;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index();
  const int warp_row = thread / 32 * 16;
  const int kv_head = head / static_cast<int>(p.group_size());

  const HeadScore<float> score(p, batch, head);
  // weight = 2^((x − maximum) · factor), where x is q·k.
  const float factor = score.mod.scale * kLog2E;
  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) / score.mod.scale : -INFINITY;
  float maximum[2] = {sink, sink}, sum[2], result[kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) sum[half] = sink != -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;

  const KeyRange range = score.band.keys_of_any(row, row_end);
  const int begin = static_cast<int>(range.begin / kKeys * kKeys);
  const int steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kKeys));
  // The copies of step n's keys and of the values before them; a step waits for both.
  const auto copy_step = [&](int step) {
    // Lengths and starts are asked for anew: registers are short in the loop.
    const int64_t keys = p.keys_of(batch), first_key = p.first_key(batch);
    if (step < steps)
      shared.key[step % kStages].template copy<Shape::kThreads>(
          Rows<T>(p.key, batch, kv_head, keys, p.head_dim, first_key), begin + step * kKeys);
    if (step > 0 && step <= steps)
      shared.value[(step - 1) % kStages].template copy<Shape::kThreads>(
          Rows<T>(p.value, batch, kv_head, keys, p.value_dim, first_key), begin + (step - 1) * kKeys);
    ptx::cp_async_commit();
  };
  const auto wait_for_step = [&] {
    ptx::cp_async_wait<kStages - 2>();
    ptx::fence_shared_for_wgmma();
    __syncthreads();
  };
  float x[kGroups][4], rescale[2];
  uint32_t weights[kKeys / 16][4];
  const auto multiply_keys = [&](int step) {  // x = queries · keysᵀ
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      ptx::wgmma(x, shared.query.rows(0, k), shared.key[step % kStages].rows(0, k), k > 0, type);
    ptx::wgmma_commit();
  };
  const auto multiply_values = [&](int step) {  // result += weights · values
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) ptx::wgmma(result, weights[k], shared.value[step % kStages].columns(k), type);
    ptx::wgmma_commit();
  };
  const auto softmax = [&](int step) {
    const int first = begin + step * kKeys;
    if (!score.covered(row, row + kRows, first, first + kKeys)) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sm80::set_unattended(x, half, TileRange::keys_of_row(score, row + warp_row + 8 * half + lane / 4, first, kKeys),
                             -INFINITY);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rescale[half] = sm80::softmax_row<false>(x, half, maximum[half], sum[half], factor);
  };
  const auto round_weights = [&] { pack_weights<T>(x, 0, weights); };

  // While a step's weights are computed, the tensor cores multiply the last step's with their values.
  shared.query.template copy<Shape::kThreads>(Rows<T>(p.query, batch, head, queries, p.head_dim, p.first_query(batch)),
                                              row);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  if (steps > 0) {
    wait_for_step();
    ptx::wgmma_fence();
    multiply_keys(0);
    copy_step(kStages - 1);
    ptx::wgmma_wait<0>();
    ptx::hold(x);
    softmax(0);
    round_weights();
    for (int step = 1; step < steps; ++step) {
      wait_for_step();
      ptx::hold(x);
      ptx::hold(result);
      ptx::wgmma_fence();
      multiply_keys(step);
      multiply_values(step - 1);
      ptx::wgmma_wait<1>();
      ptx::hold(x);
      softmax(step);
      ptx::hold(x);
      copy_step(step + kStages - 1);  // its branches keep the compiler from moving the next wait up, before the softmax
      ptx::wgmma_wait<0>();
      ptx::hold(result);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) result[n][i] *= rescale[i / 2];
      round_weights();
    }
    wait_for_step();
    ptx::hold(result);
    ptx::wgmma_fence();
    multiply_values(steps - 1);
    ptx::wgmma_wait<0>();
    ptx::hold(result);
  }

  if (steps == 0) ptx::cp_async_wait<0>();  // nothing was attended: only the query's copy is to be waited for
  __syncthreads();                          // the queries are read no more: their tile takes the output
  float inverse[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = row_sum(sum[half]);
    inverse[0][half] = Softmax::inverse_sum(total);
    const int r = row + warp_row + 8 * half + lane / 4;
    if (lane % 4 == 0 && r < queries)
      static_cast<float*>(out.logsumexp)[p.first_row(batch, head) + r] =
          Softmax::logsumexp(maximum[half] * score.mod.scale, total);
  }
  const Rows<T> to(out.out, batch, head, queries, p.value_dim, p.first_query(batch));
  store_parts(to, row + warp_row, result, inverse, shared.query, warp_row);
#endif
}

template <class T, int kDim>
void short_forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  using Shape = ShortForwardShape;
  const int64_t tiles = (p.query_length + Shape::kRows - 1) / Shape::kRows;
  launch(short_forward_kernel<T, kDim>, p.batch * p.heads * tiles, Shape::kThreads, sizeof(ShortForwardShared<T, kDim>),
         stream, p, out);
}

}  // namespace torch_attn::cuda::sm90
