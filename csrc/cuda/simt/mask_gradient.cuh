// grad_attn_mask for any type and size. Hard attention's has the same blocks.
#pragma once

#include "../mask_block.cuh"
#include "../row_statistics.cuh"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

static_assert(kTile == kMaskTile, "");

// Each thread's part of the block's sums to the mask's gradient.
template <class Real>
TA_DEVICE void store_mask_gradient(const MaskBlock& block, const TensorView& mask, Shared<Real, kTile>& shared,
                                   const Real (&sum)[kPerThread][kPerThread]) {
  __syncthreads();
  constexpr int kPitch = Shared<Real, kTile>::kWeightPitch;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      shared.weights[(thread_y() * kPerThread + i) * kPitch + thread_x() + kSide * j] = sum[i][j];
  __syncthreads();
  block.store(mask, shared.weights, kPitch, kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                         const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kTile>*>(memory);

  const MaskBlock block(p, t.grad_attn_mask);
  Real sum[kPerThread][kPerThread] = {};
  for (int64_t batch = block.batches.begin; batch < block.batches.end; ++batch) {
    for (int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      const HeadScore<Real> score(p, batch, head);
      const int64_t kv_head = head / p.group_size();
      const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
      const Rows<T> key(p.key, batch, kv_head, p.key_length, p.head_dim);
      const Rows<T> value(p.value, batch, kv_head, p.key_length, p.value_dim);
      const Rows<T> grad_out(t.grad_out, batch, head, p.query_length, p.value_dim);
      for (int64_t row = block.rows.begin; row < block.rows.end; row += kTile) {
        const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
        const BackwardRows<Real> tile_rows(p, t, statistics, score.batch_head, row);
        const KeyRange attended = score.band.keys_of_any(row, row_end);
        for (int64_t first = block.keys.begin; first < block.keys.end; first += kTile) {
          if (first >= attended.end || first + kTile <= attended.begin) continue;
          Real dot[kPerThread][kPerThread] = {}, grad_weight[kPerThread][kPerThread] = {};
          multiply_transposed(dot, shared, query, row, key, first);
          multiply_transposed(grad_weight, shared, grad_out, row, value, first);
          const uint32_t kept = score.dropout_on ? kept_of_rows(score, row + thread_y() * kPerThread, first) : ~0u;
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            const int64_t r = row + thread_y() * kPerThread + i;
            const BackwardRow<Real> stats = tile_rows[thread_y() * kPerThread + i];
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) {
              const Real s = score.score(score.mod.capped(dot[i][j]), r, first + thread_x() + kSide * j, true);
              sum[i][j] += stats.weight(s) * (score.dropped(grad_weight[i][j], kept >> (8 * j + i) & 1) - stats.delta);
            }
          }
        }
      }
    }
  }
  store_mask_gradient(block, t.grad_attn_mask, shared, sum);
}

template <class T>
void mask_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  launch(mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         sizeof(Shared<Accumulator<T>, kTile>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
