// grad_attn_mask, in the mask's own broadcast shape: one block per 64 x 64 tile of it. The block goes through
// everything that the mask was broadcast over (batches, heads, rows, keys) and sums in a fixed order, so the gradient
// is deterministic. Every tier uses this kernel; hard attention's has the same blocks.
#pragma once

#include "../row_statistics.cuh"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

// The part of one dimension that a block covers: one index or tile of it, or all when the mask was broadcast over it.
struct Extent {
  int64_t begin, end;

  // Takes this dimension's index off the block index.
  TA_DEVICE static Extent take(int64_t& block, int64_t size, int64_t tile, int64_t mask_stride) {
    if (mask_stride == 0) return {0, size};
    const int64_t tiles = ceil_div(size, tile), begin = block % tiles * tile;
    block /= tiles;
    return {begin, begin + tile < size ? begin + tile : size};
  }
};

// What one block sums and writes.
struct MaskBlock {
  Extent keys, rows, heads, batches;

  TA_DEVICE MaskBlock(const AttentionProblem& p, const TensorView& mask) {
    int64_t block = blockIdx.x;
    keys = Extent::take(block, p.key_length, kTile, mask.stride[3]);
    rows = Extent::take(block, p.query_length, kTile, mask.stride[2]);
    heads = Extent::take(block, p.heads, 1, mask.stride[1]);
    batches = Extent::take(block, p.batch, 1, mask.stride[0]);
  }

  // The block's sums to the mask's gradient. Where the mask was broadcast over rows (keys), the tile's rows (keys) all
  // belong to one element of it.
  template <class Real>
  TA_DEVICE void store(const TensorView& mask, Shared<Real, kTile>& shared,
                       const Real (&sum)[kPerThread][kPerThread]) const {
    __syncthreads();
    Real* const tile = shared.weights;
    constexpr int kPitch = Shared<Real, kTile>::kWeightPitch;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
        tile[(thread_y() * kPerThread + i) * kPitch + thread_x() + kSide * j] = sum[i][j];
    __syncthreads();

    const bool one_row = mask.stride[2] == 0, one_key = mask.stride[3] == 0;
    const int tile_rows = one_row ? 1 : static_cast<int>(rows.end - rows.begin);
    const int tile_keys = one_key ? 1 : static_cast<int>(keys.end - keys.begin);
    Real* const to = static_cast<Real*>(mask.data) + batches.begin * mask.stride[0] + heads.begin * mask.stride[1] +
                     rows.begin * mask.stride[2] + keys.begin * mask.stride[3];
    for (int i = threadIdx.x; i < tile_rows * tile_keys; i += kThreads) {
      const int r = i / tile_keys, k = i % tile_keys;
      Real total = 0;
      for (int r2 = r; r2 < (one_row ? kTile : r + 1); ++r2) {
        Real of_row = 0;  // apart, so that a long sum loses fewer digits
        for (int k2 = k; k2 < (one_key ? kTile : k + 1); ++k2) of_row += tile[r2 * kPitch + k2];
        total += of_row;
      }
      to[r * mask.stride[2] + k * mask.stride[3]] = total;
    }
  }
};

inline int64_t mask_gradient_blocks(const AttentionProblem& p, const TensorView& mask) {
  const auto parts = [&](int dimension, int64_t size, int64_t tile) {
    return mask.stride[dimension] == 0 ? 1 : (size + tile - 1) / tile;
  };
  return parts(0, p.batch, 1) * parts(1, p.heads, 1) * parts(2, p.query_length, kTile) * parts(3, p.key_length, kTile);
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
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            const int64_t r = row + thread_y() * kPerThread + i;
            const BackwardRow<Real> stats = tile_rows[thread_y() * kPerThread + i];
            const uint32_t kept = score.dropout_on ? kept_of_row(score, r, first) : ~0u;
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) {
              const Real s = score.score(score.mod.capped(dot[i][j]), r, first + thread_x() + kSide * j, true);
              sum[i][j] += stats.weight(s) * (score.dropped(grad_weight[i][j], kept >> j & 1) - stats.delta);
            }
          }
        }
      }
    }
  }
  block.store(t.grad_attn_mask, shared, sum);
}

template <class T>
void mask_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  launch(mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         sizeof(Shared<Accumulator<T>, kTile>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
