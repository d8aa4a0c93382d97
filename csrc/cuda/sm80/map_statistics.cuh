// attention_statistics on tensor cores: one block per 64 query rows walks over the keys for everything a row knows of
// its weights; then, for the sums of columns, which need logsumexp, one block per 64 keys goes through the rows in a
// fixed order. A tile's copy is under way while the scores of the one before are looked at.
#pragma once

#include "../choice.cuh"
#include "../launch.h"
#include "map_tile.cuh"

namespace torch_attn::cuda::sm80 {

// Math with the exponential of the hardware.
struct FastMath : Math<float> {
  TA_DEVICE static float exp(float x) { return ptx::ex2_approx(x * kLog2E); }
};

TA_DEVICE int row_min(int x) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const int other = __shfl_xor_sync(~0u, x, step);
    x = other < x ? other : x;
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    map_statistics_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ StatisticsOutputs out,
                          float* weight_scale) {
  using M = FastMath;
  constexpr int kNoKey = 0x7FFFFFFF;
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim);
  const ChunkedTile<T> query_tile(memory, 0, chunks), key_tile(memory, 1, chunks);

  const int64_t tiles = ceil_div(p.query_length, kMapTile);
  const int64_t row = (tiles - 1 - blockIdx.x % tiles) * kMapTile;  // the longest rows of a causal mask first
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t row_end = row + kMapTile < p.query_length ? row + kMapTile : p.query_length;
  const int lane = lane_index(), tile_row = 16 * warp_index() + lane / 4;  // and the one eight below

  const MapScore<float> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const int64_t first_row = score.batch_head * p.query_length;
  const float window = static_cast<float>(out.mass_window);
  const auto top_of = [&](int64_t r) {
    return Leaders<float>(out.top_k, out.top_indices + (first_row + r) * out.top_k,
                          static_cast<float*>(out.top_weights) + (first_row + r) * out.top_k);
  };

  // Each lane gathers its own keys; the four that share a row meet at the end.
  float maximum[2];
  RowSums<M> sums[2];
  int best[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = -INFINITY;
    sums[half] = RowSums<M>::zero();
    best[half] = kNoKey;
    const int64_t r = row + tile_row + 8 * half;
    if (out.top_k > 0 && r < p.query_length) top_of(r).clear(lane % 4, 4);
  }

  const KeySteps steps(score, row, row_end);
  if (steps.count > 0) {
    query_tile.copy(query, row);
    key_tile.copy(key, steps.begin);
  }
  ptx::cp_async_commit();
  for (int step = 0; step < steps.count; ++step) {
    const int64_t first = steps.begin + int64_t{step} * kMapTile;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile has landed
    MapAccumulators x = {};
    multiply_chunks(x, query_tile, 16 * warp_index(), key_tile);
    __syncthreads();  // and is read no more
    if (step + 1 < steps.count) key_tile.copy(key, first + kMapTile);
    ptx::cp_async_commit();

    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + tile_row + 8 * half;
      float tile_scores[1][kMapLaneKeys];
      scores_of_row(tile_scores, x, half, score, r, first, tested);
      const float (&scores)[kMapLaneKeys] = tile_scores[0];
      float highest = maximum[half];
#pragma unroll
      for (int i = 0; i < kMapLaneKeys; ++i)
        if (scores[i] > highest) highest = scores[i], best[half] = static_cast<int>(first) + column_of_lane(i);
      sums[half].rescale(maximum[half], highest);
      maximum[half] = highest;
      const float subtracted = OnlineSoftmax<M>::safe_maximum(highest);
      const float to_first = static_cast<float>(first - score.band.position(r));
#pragma unroll
      for (int i = 0; i < kMapLaneKeys; ++i)
        sums[half].add(scores[i] - subtracted, M::abs(to_first + static_cast<float>(column_of_lane(i))), window);
      if (out.top_k > 0) {
        const float no_noise[kMapLaneKeys] = {};
        rank<4>(top_of(r), r < p.query_length, first, scores, no_noise, 0.0f, column_of_lane);
      }
    }
  }

  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) : -INFINITY;
  __syncwarp();  // the leaders are known
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float highest = row_max(maximum[half]);
    const int lowest_key = row_min(maximum[half] == highest ? best[half] : kNoKey);
    sums[half].rescale(maximum[half], highest);
    const RowSums<M> total = {row_sum(sums[half].sum), row_sum(sums[half].score_sum), row_sum(sums[half].distance_sum),
                              row_sum(sums[half].window_sum)};
    const int64_t r = row + tile_row + 8 * half;
    if (r >= p.query_length) continue;
    const auto of_row = torch_attn::RowStatistics<M>::of(highest, total, sink);
    if (out.top_k > 0) {
      const Leaders<float> top = top_of(r);
      for (int64_t i = lane % 4; i < out.top_k; i += 4)
        top.score[i] = top.index[i] < 0 ? 0.0f : M::exp(top.score[i] - highest) * of_row.factor;
    }
    if (lane % 4 != 0) continue;
    write_statistics(out, weight_scale, first_row + r, of_row, highest, lowest_key == kNoKey ? -1 : lowest_key);
  }
}

// Tiles are transposed, rows are keys.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_column_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ StatisticsOutputs out,
                      const float* weight_scale) {
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim);
  const ChunkedTile<T> key_tile(memory, 0, chunks), query_tile(memory, 1, chunks);

  const int64_t tiles = ceil_div(p.key_length, kMapTile), first = blockIdx.x % tiles * kMapTile;
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int lane = lane_index(), tile_key = 16 * warp_index() + lane / 4;
  const MapScore<float> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);

  float sum[2] = {};
  const RowRange range = score.rows_of_any(first, first + kMapTile);
  int64_t row = range.begin / kMapTile * kMapTile;
  if (row < range.end) {
    key_tile.copy(key, first);
    query_tile.copy(query, row);
  }
  ptx::cp_async_commit();
  for (; row < range.end; row += kMapTile) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    MapAccumulators x = {};
    multiply_chunks(x, key_tile, 16 * warp_index(), query_tile);
    __syncthreads();
    if (row + kMapTile < range.end) query_tile.copy(query, row + kMapTile);
    ptx::cp_async_commit();

    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
    const WeightRows<float> rows(p, out.logsumexp, weight_scale, score.batch_head, row);
    float scores[2][1][kMapLaneKeys], of_tile[2] = {};  // apart, so that a long sum loses fewer digits
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scores_of_key(scores[half], x, half, score, first + tile_key + 8 * half, row, tested);
#pragma unroll
    for (int i = 0; i < kMapLaneKeys; ++i) {
      const BackwardRow<float> stats = rows[column_of_lane(i)];
#pragma unroll
      for (int half = 0; half < 2; ++half) of_tile[half] += stats.weight(scores[half][0][i]);
    }
    sum[0] += of_tile[0];
    sum[1] += of_tile[1];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t k = first + tile_key + 8 * half;
    const float total = row_sum(sum[half]);
    if (lane % 4 == 0 && k < p.key_length)
      static_cast<float*>(out.column_sum)[score.batch_head * p.key_length + k] = total;
  }
}

template <class T>
void map_statistics(const AttentionProblem& p, const StatisticsOutputs& out, void* workspace, const Stream& stream) {
  float* const weight_scale = static_cast<float*>(workspace);
  const size_t bytes = chunked_bytes<T>(p.head_dim, 2);
  launch(map_statistics_kernel<T>, p.batch * p.heads * map_tiles(p.query_length), kThreads, bytes, stream, p, out,
         weight_scale);
  if (out.column_sum)
    launch<AttentionProblem, StatisticsOutputs, const float*>(map_column_kernel<T>,
                                                              p.batch * p.heads * map_tiles(p.key_length), kThreads,
                                                              bytes, stream, p, out, weight_scale);
}

}  // namespace torch_attn::cuda::sm80
