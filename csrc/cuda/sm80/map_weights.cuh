// attention_weights from a known logsumexp, on tensor cores: one block per 64 x 64 tile of the map. For the mean over
// heads the block goes through the heads and adds in registers, so that nothing of the size of all heads' weights
// exists.
#pragma once

#include "../launch.h"
#include "map_tile.cuh"

namespace torch_attn::cuda::sm80 {

template <class T>
__global__ void __launch_bounds__(kThreads)
    map_weights_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ WeightsOutputs out,
                       const float* weight_scale) {
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim);
  const ChunkedTile<T> query_tile(memory, 0, chunks), key_tile(memory, 1, chunks);

  const int64_t key_tiles = ceil_div(p.key_length, kMapTile), row_tiles = ceil_div(p.query_length, kMapTile);
  const int64_t heads = out.mean ? 1 : p.heads;  // of the output
  int64_t index = blockIdx.x;
  const int64_t first = index % key_tiles * kMapTile;
  index /= key_tiles;
  const int64_t row = index % row_tiles * kMapTile;
  index /= row_tiles;
  const int64_t out_head = index % heads, batch = index / heads;
  const int64_t row_end = row + kMapTile < p.query_length ? row + kMapTile : p.query_length;
  const int lane = lane_index(), warp_row = 16 * warp_index();
  const int64_t head_end = out.mean ? p.heads : out_head + 1;

  float sum[1][kMapGroups][4] = {};
  const KeyRange range = MapScore<float>(p, batch, out_head).band.keys_of_any(row, row_end);  // the same for every head
  const bool attended = !range.empty() && first < range.end && first + kMapTile > range.begin;
  const auto copy = [&](int64_t head) {
    query_tile.copy(Rows<T>(p.query, batch, head, p.query_length, p.head_dim), row);
    key_tile.copy(Rows<T>(p.key, batch, head / p.group_size(), p.key_length, p.head_dim), first);
  };
  if (attended) copy(out_head);
  ptx::cp_async_commit();
  for (int64_t head = out_head; attended && head < head_end; ++head) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    MapAccumulators x = {};
    multiply_chunks(x, query_tile, warp_row, key_tile);
    __syncthreads();
    if (head + 1 < head_end) copy(head + 1);
    ptx::cp_async_commit();

    const MapScore<float> score(p, batch, head);
    const WeightRows<float> rows(p, out.logsumexp, weight_scale, score.batch_head, row);
    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + lane / 4 + 8 * half;
      const BackwardRow<float> stats = rows[r];
      float scores[1][kMapLaneKeys];
      scores_of_row(scores, x, half, score, row + r, first, tested);
#pragma unroll
      for (int i = 0; i < kMapLaneKeys; ++i) sum[0][i / 2][2 * half + i % 2] += stats.weight(scores[0][i]);
    }
  }

  const float factor = out.mean ? 1.0f / static_cast<float>(p.heads) : 1.0f, factors[1][2] = {{factor, factor}};
  const Rows<T> to(out.weights, batch, out_head, p.query_length, p.key_length);
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(to.data) | to.stride * sizeof(T) | p.key_length * sizeof(T)) & 15) == 0;
  if (aligned) {
    store_rows<1, kMapTile>(to, row + warp_row, static_cast<int>(first), sum, factors, query_tile.chunk[0], warp_row);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + warp_row + lane / 4 + 8 * half;
    if (r >= p.query_length) continue;
#pragma unroll
    for (int i = 0; i < kMapLaneKeys; ++i) {
      const int64_t k = first + column_of_lane(i);
      if (k < p.key_length) store(to.data + r * to.stride + k, sum[0][i / 2][2 * half + i % 2] * factor);
    }
  }
}

template <class T>
void map_weights(const AttentionProblem& p, const WeightsOutputs& out, void* workspace, const Stream& stream) {
  launch<AttentionProblem, WeightsOutputs, const float*>(
      map_weights_kernel<T>, p.batch * (out.mean ? 1 : p.heads) * map_tiles(p.query_length) * map_tiles(p.key_length),
      kThreads, chunked_bytes<T>(p.head_dim, 2), stream, p, out, static_cast<const float*>(workspace));
}

}  // namespace torch_attn::cuda::sm80
