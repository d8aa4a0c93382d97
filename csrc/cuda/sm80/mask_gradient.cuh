// grad_attn_mask on tensor cores, of attention and of attention maps: the blocks of mask_block.cuh, a warp for 16 rows.
#pragma once

#include "../mask_block.cuh"
#include "map_gradient.cuh"

namespace torch_attn::cuda::sm80 {

constexpr int kMaskPitch = kMaskTile + 8;  // of the block's sums in shared memory

// Calls body(score, batch, head, row, first) for the tiles of a block that `Score` lets attend.
template <class Score, class Body>
TA_DEVICE void for_each_tile(const MaskBlock& block, const AttentionProblem& p, const Body& body) {
  for (int64_t batch = block.batches.begin; batch < block.batches.end; ++batch)
    for (int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      const Score score(p, batch, head);
      for (int64_t row = block.rows.begin; row < block.rows.end; row += kMaskTile) {
        const int64_t row_end = row + kMaskTile < p.query_length ? row + kMaskTile : p.query_length;
        const KeyRange attended = score.band.keys_of_any(row, row_end);
        for (int64_t first = block.keys.begin; first < block.keys.end; first += kMaskTile)
          if (first < attended.end && first + kMaskTile > attended.begin) body(score, batch, head, row, first);
      }
    }
}

// x = (64 rows of a from a_row on) · (64 rows of b from b_row on)ᵀ, through the block's shared memory.
template <class T>
TA_DEVICE void product_of_tiles(MapAccumulators& x, unsigned char* memory, const Rows<T>& a, int64_t a_row,
                                const Rows<T>& b, int64_t b_row) {
  const int chunks = chunks_of(a.columns);
  const ChunkedTile<T> a_tile(memory, 0, chunks), b_tile(memory, 1, chunks);
  __syncthreads();  // whatever was there is read no more
  a_tile.copy(a, a_row);
  b_tile.copy(b, b_row);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  multiply_chunks(x, a_tile, 16 * warp_index(), b_tile);
}

TA_DEVICE void store_mask_gradient(const MaskBlock& block, const TensorView& mask, unsigned char* memory,
                                   const MapAccumulators& sum) {
  float* const tile = reinterpret_cast<float*>(memory);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kMapGroups; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_pair(tile + (16 * warp_index() + lane_index() / 4 + 8 * half) * kMaskPitch + 8 * n + 2 * (lane_index() % 4),
                 sum[0][n][2 * half], sum[0][n][2 * half + 1]);
  __syncthreads();
  block.store(mask, tile, kMaskPitch, kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                         const RowStatistics<float> statistics) {
  TA_DYNAMIC_SHARED(memory);
  const int lane = lane_index(), warp_row = 16 * warp_index();
  const MaskBlock block(p, t.grad_attn_mask);
  MapAccumulators sum = {};
  for_each_tile<HeadScore<float>>(
      block, p, [&](const auto& score, int64_t batch, int64_t head, int64_t row, int64_t first) {
        const int64_t kv_head = head / p.group_size();
        MapAccumulators x = {}, grad = {};
        product_of_tiles(x, memory, Rows<T>(p.query, batch, head, p.query_length, p.head_dim), row,
                         Rows<T>(p.key, batch, kv_head, p.key_length, p.head_dim), first);
        product_of_tiles(grad, memory, Rows<T>(t.grad_out, batch, head, p.query_length, p.value_dim), row,
                         Rows<T>(p.value, batch, kv_head, p.key_length, p.value_dim), first);
        const BackwardRows<float> tile_rows(p, t, statistics, score.batch_head, row);
        const BackwardRow<float> rows[2] = {tile_rows[warp_row + lane / 4], tile_rows[warp_row + lane / 4 + 8]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float scores[1][kMapLaneKeys];
          scores_of_row(scores, x, half, score, row + warp_row + lane / 4 + 8 * half, first, true);
#pragma unroll
          for (int j = 0; j < kMapLaneKeys; ++j) x[0][j / 2][2 * half + j % 2] = rows[half].weight(scores[0][j]);
        }
        uint32_t kept = ~0u;
#pragma unroll
        for (int n = 0; n < kMapGroups; ++n) {
          if (score.dropout_on && n % 4 == 0) kept = kept_of_query_rows(score, row + warp_row, first + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sum[0][n][e] +=
                x[0][n][e] * (score.dropped(grad[0][n][e], is_kept_in_query_rows(kept, n, e)) - rows[e / 2].delta);
        }
      });
  store_mask_gradient(block, t.grad_attn_mask, memory, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    map_mask_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                             const RowStatistics<float> statistics) {
  TA_DYNAMIC_SHARED(memory);
  const MaskBlock block(p, t.grad_attn_mask);
  MapAccumulators sum = {};
  for_each_tile<MapScore<float>>(
      block, p, [&](const auto& score, int64_t batch, int64_t head, int64_t row, int64_t first) {
        const WeightGradients<T> source(p, t, batch, head);
        MapAccumulators x = {};
        product_of_tiles(x, memory, Rows<T>(p.query, batch, head, p.query_length, p.head_dim), row,
                         Rows<T>(p.key, batch, head / p.group_size(), p.key_length, p.head_dim), first);
        const BackwardRows<float> rows(p, t, statistics, score.batch_head, row);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = 16 * warp_index() + lane_index() / 4 + 8 * half;
          float scores[1][kMapLaneKeys], gradient[kMapLaneKeys];
          scores_of_row(scores, x, half, score, row + r, first, true);
          source.of_scores(gradient, score, rows[r], row + r, LaneKeys{first}, scores[0]);
#pragma unroll
          for (int i = 0; i < kMapLaneKeys; ++i) sum[0][i / 2][2 * half + i % 2] += gradient[i];
        }
      });
  store_mask_gradient(block, t.grad_attn_mask, memory, sum);
}

template <class T>
size_t mask_gradient_bytes(int64_t columns) {
  constexpr size_t kSums = kMaskTile * kMaskPitch * sizeof(float);
  const size_t tiles = chunked_bytes<T>(columns, 2);
  return tiles > kSums ? tiles : kSums;
}

template <class T>
void mask_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  launch(mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         mask_gradient_bytes<T>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim), stream, p, t,
         RowStatistics<float>(p, workspace));
}

template <class T>
void map_mask_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         mask_gradient_bytes<T>(p.head_dim), stream, p, t, RowStatistics<float>(p, workspace));
}

}  // namespace torch_attn::cuda::sm80
