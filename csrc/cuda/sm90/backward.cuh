// grad_query, grad_key and grad_value on Hopper's warpgroup matrix instructions, for scaled scores with a band mask:
// one block per 128 keys of a key/value head walks over the query rows that attend them, as sm80/all_gradients.cuh
// does, and adds its part of grad_query with atomics. Each of two warpgroups has 64 keys; a third one brings the rows
// (backward_steps.cuh). Scores are transposed, Sᵀ = keys · queriesᵀ, so that weights are a left operand as they lie in
// registers. While scores become weights and gradients, the tensor cores are at products of the step before and after,
// or of the other warpgroup (Shah et al. 2024, "FlashAttention-3", §3.2 and appendix B.1).
#pragma once

#include "../sm80/query_sums.cuh"
#include "backward_steps.cuh"
#include "block_order.h"
#include "variants.h"

namespace torch_attn::cuda::sm90 {

using sm80::lane_index;
using sm80::LanesApart;
using sm80::TileRange;

struct alignas(8) FloatPair {
  float x[2];
};

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardShape<kDim>::kThreads, 1)
    all_gradients_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                         const RowStatistics<float> statistics, float* const sums, const BlockOrder order) {
#if TA_HAS_WGMMA
  using Shape = BackwardShape<kDim>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kGroups = kRows / 8;
  constexpr int kSteps = kPartColumns / 16;  // of products that sum over a part's rows
  const T type{};
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<BackwardShared<T, kDim>*>(memory);

  const BlockOrder::Place place = order.place_of(static_cast<int>(blockIdx.x));
  const int batch = place.batch, kv_head = place.head, first = place.tile * kKeys;
  if (first >= p.keys_of(batch)) return;  // of a packed sequence shorter than others
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(~0u, thread / kWarpgroup, 0);
  if (thread == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(shared.full + i, kWarpgroup);
      ptx::mbarrier_init(shared.empty + i, Shape::kConsumers / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == Shape::kWarpgroups) {
    ptx::set_registers<Shape::kProducerRegisters, false>();
    bring_steps(shared, p, t, statistics, batch, kv_head, first);
  } else {
    ptx::set_registers<Shape::kConsumerRegisters, true>();
    const int lane = lane_index(), warp_row = thread / 32 * 16, group_key = warpgroup * kWarpgroupRows;
    RowSteps<kRows> step(p, batch, kv_head, first, kKeys);
    // The rows that attend a key are the same in every head.
    const auto rows_of_key = [&](int key) {
      const RowRange rows = HeadScore<float>(p, batch, 0).rows_of_any(key, key + 1);
      const auto cut = [](int64_t row) { return static_cast<int>(row < 1 << 30 ? row : 1 << 30); };
      return TileRange{cut(rows.begin), cut(rows.end)};
    };
    const TileRange attending[2] = {rows_of_key(first + warp_row + lane / 4),
                                    rows_of_key(first + warp_row + 8 + lane / 4)};
    // All of the warpgroup's keys: the last one's rows begin last, the first one's end first.
    const TileRange last = rows_of_key(first + group_key + kWarpgroupRows - 1);
    const TileRange covered{last.begin < last.end ? last.begin : 1 << 30, rows_of_key(first + group_key).end};

    float x[kGroups][4], grad[kGroups][4];  // scores, then weights; the gradients of the weights
    uint32_t weights[kSteps][4];            // of a part of the rows
    float grad_key[kDim / 8][4] = {}, grad_value[kDim / 8][4] = {};
    const auto multiply_queries = [&](int stage) {  // x = keys · queriesᵀ
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
        ptx::wgmma(x, shared.key.rows(group_key, k), shared.stage[stage].query.rows(0, k), k > 0, type);
      ptx::wgmma_commit();
    };
    const auto multiply_grad_out = [&](int stage) {  // grad = values · grad_outᵀ
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
        ptx::wgmma(grad, shared.value.rows(group_key, k), shared.stage[stage].grad_out.rows(0, k), k > 0, type);
      ptx::wgmma_commit();
    };

    // Of a step's grad_query, 64 rows by as many columns.
    const int rows_part = kDim <= 64 ? warpgroup : 0, columns_part = kDim <= 64 ? 0 : warpgroup;
    int stage = 0, buffer = 0, parity = 0;
    // From the scores to their gradients in shared memory.
    const auto finish_scores = [&](auto is_first) {
      constexpr bool kFirst = decltype(is_first)::value;
      const int row = step.row;
      const float factor = static_cast<float>(p.scale) * kLog2E;
      auto& rows = shared.rows[stage];
      auto& grad_score = shared.grad_score[buffer];
      const bool masked = row < covered.begin || row + kRows > covered.end;

      if constexpr (kFirst || !Shape::kEarlyScores) ptx::wgmma_wait<kFirst ? 1 : 2>();
      ptx::hold(x);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const auto shift = *reinterpret_cast<const FloatPair*>(rows.shift + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = ptx::ex2_approx(x[n][i] * factor - shift.x[i % 2]);
      }
      if (masked) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          sm80::set_unattended(x, half, TileRange{attending[half].begin - row, attending[half].end - row}, 0);
      }
      ptx::wgmma_wait<0>();
      ptx::hold(grad);
      if constexpr (!kFirst) {  // the last step's rows are read no more
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(shared.empty + Shape::last_stage(stage));
      }
#pragma unroll
      for (int part = 0; part < kRows / kPartColumns; ++part) {
        if (part > 0) ptx::wgmma_wait<0>();  // the weights' registers take the next ones
        pack_weights<T>(x, 2 * part * kSteps, weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          ptx::wgmma(grad_value, weights[k], shared.stage[stage].grad_out.columns(part * kSteps + k), type);
        ptx::wgmma_commit();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          float w[2][4];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int group = 2 * (part * kSteps + k) + n;
            const auto delta = *reinterpret_cast<const FloatPair*>(rows.delta + 8 * group + 2 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i) w[n][i] = x[group][i] * (grad[group][i] - delta.x[i % 2]);
          }
          if (masked) {  // whatever values, NaN even, were met there
            const int to_row = row + kPartColumns * part + 16 * k;
#pragma unroll
            for (int half = 0; half < 2; ++half)
              sm80::set_unattended(w, half, TileRange{attending[half].begin - to_row, attending[half].end - to_row}, 0);
          }
          const uint32_t words[4] = {ptx::pack(w[0][0], w[0][1], type), ptx::pack(w[0][2], w[0][3], type),
                                     ptx::pack(w[1][0], w[1][1], type), ptx::pack(w[1][2], w[1][3], type)};
          ptx::stmatrix_x4(grad_score.part[part].piece(warp_row + lane % 16, 16 * k + lane / 16 * 8), words);
        }
      }
      ptx::fence_shared_for_wgmma();
    };
    // grad_query and grad_key of this step, the scores of the next.
    const auto multiply_gradients = [&](auto is_last) {
      constexpr bool kLast = decltype(is_last)::value;
      if constexpr (!kLast) {
        if (Shape::next_stage(stage) == 0) parity ^= 1;
        ptx::mbarrier_wait(shared.full + Shape::next_stage(stage), parity);
      }
      if constexpr (!kLast && Shape::kEarlyScores) {
        ptx::wgmma_fence();
        multiply_queries(Shape::next_stage(stage));
      }
      // The gradients of the scores are whole, the last step's are read no more.
      ptx::barrier_sync(1, Shape::kConsumers);
      ptx::wgmma_fence();
      float grad_query[8][4];
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        ptx::wgmma<true, true>(grad_query, shared.grad_score[buffer].columns(k, rows_part),
                               shared.key.columns(k, columns_part), k > 0, type);
      ptx::wgmma_commit();
      if constexpr (!kLast && !Shape::kEarlyScores) multiply_queries(Shape::next_stage(stage));
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k)
        ptx::wgmma<false, true>(grad_key, shared.grad_score[buffer].rows(group_key, k),
                                shared.stage[stage].query.columns(k), true, type);
      ptx::wgmma_commit();
      ptx::wgmma_wait<kLast || Shape::kEarlyScores ? 1 : 2>();
      ptx::hold(grad_query);
      const int query = step.row + rows_part * kPartColumns + warp_row % kWarpgroupRows;
      if (query < step.end) {  // beyond, there may be no sums
        float* const to =
            sm80::query_sums<kDim>(sums, p, batch, step.head, query) + columns_part * kPartColumns / 8 * 128 + 4 * lane;
#pragma unroll
        for (int n = 0; n < 8; ++n) ptx::add_atomically(to + 128 * n, grad_query[n]);
      }
    };

    if (!step.done()) {
      ptx::mbarrier_wait(shared.full, 0);
      ptx::hold(grad_key);
      ptx::hold(grad_value);
      ptx::wgmma_fence();
      multiply_queries(0);
      multiply_grad_out(0);
      finish_scores(std::true_type{});
      for (;;) {
        RowSteps<kRows> following = step;
        following.advance();
        if (following.done()) break;
        multiply_gradients(std::false_type{});
        step = following;
        stage = Shape::next_stage(stage);
        buffer ^= 1;
        ptx::wgmma_fence();
        multiply_grad_out(stage);
        finish_scores(std::false_type{});
      }
      multiply_gradients(std::true_type{});
      ptx::wgmma_wait<0>();
      ptx::hold(grad_key);
      ptx::hold(grad_value);
    }
    // The keys are read no more: their tile takes a result on its way to memory.
    ptx::barrier_sync(1, Shape::kConsumers);

    const auto store = [&](const TensorView& view, int64_t columns, const auto& sum, float scale, auto& tile) {
      if (!view.defined()) return;
      const float factors[1][2] = {{scale, scale}};
      const Rows<T> to(view, batch, kv_head, p.keys_of(batch), columns, p.first_key(batch));
      store_parts(to, first + warp_row, sum, factors, tile, warp_row);
    };
    store(t.grad_key, p.head_dim, grad_key, static_cast<float>(p.scale), shared.key);
    store(t.grad_value, p.value_dim, grad_value, 1.0f, shared.value);
  }
#endif
}

template <class T, int kDim>
void all_gradients(const AttentionProblem& p, const BackwardTensors& t, void* statistics, void* workspace,
                   const Stream& stream) {
  using Shape = BackwardShape<kDim>;
  float* const sums = static_cast<float*>(workspace);
  clear(sums, sm80::QuerySums::bytes(p, kDim), stream);
  const int64_t tiles = (p.key_length + Shape::kKeys - 1) / Shape::kKeys;
  // A head's queries and grad_out, and its sums, while one query head of a group after the other is gone through.
  const BlockOrder order =
      BlockOrder::make(p, p.kv_heads, tiles, p.query_length * kDim * 8, device_facts(stream.device).multiprocessors);
  launch(all_gradients_kernel<T, kDim>, p.batch * p.kv_heads * tiles, Shape::kThreads, sizeof(BackwardShared<T, kDim>),
         stream, p, t, RowStatistics<float>(p, statistics), sums, order);
  sm80::store_query_sums<T, kDim, LanesApart>(p, t.grad_query, sums, static_cast<float>(p.scale), stream);
}

}  // namespace torch_attn::cuda::sm90
