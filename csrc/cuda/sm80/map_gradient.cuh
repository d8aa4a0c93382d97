// The backward pass of attention maps on tensor cores: simt/map_gradient.cuh's kernels. What is streamed twice, for the
// scores and for the gradient, has two buffers.
#pragma once

#include "../launch.h"
#include "../weight_gradients.cuh"
#include "gradient_steps.cuh"
#include "map_tile.cuh"

namespace torch_attn::cuda::sm80 {

// Chunks of columns of a gradient that a block computes: their accumulators take 32 registers each.
constexpr int kChunks = 2;

// What every block of 64 query rows starts from.
template <class T>
struct RowBlock {
  int64_t row, head, batch, row_end;

  // index: of the block among all of (batch, head, tile of rows).
  TA_DEVICE RowBlock(const AttentionProblem& p, int64_t index) {
    const int64_t tiles = ceil_div(p.query_length, kMapTile);
    row = (tiles - 1 - index % tiles) * kMapTile;  // the longest rows of a causal mask first
    head = index / tiles % p.heads;
    batch = index / tiles / p.heads;
    row_end = row + kMapTile < p.query_length ? row + kMapTile : p.query_length;
  }
  TA_DEVICE Rows<T> query(const AttentionProblem& p) const {
    return {p.query, batch, head, p.query_length, p.head_dim};
  }
  TA_DEVICE Rows<T> key(const AttentionProblem& p) const {
    return {p.key, batch, head / p.group_size(), p.key_length, p.head_dim};
  }
};

// A lane's keys in a row of a tile that starts at `first`.
struct LaneKeys {
  int64_t first;
  TA_DEVICE static int offset(int i) { return column_of_lane(i); }
};
// Its two keys in a tile whose rows are keys.
struct LaneKeyRows {
  int64_t first;
  TA_DEVICE static int offset(int half) { return 8 * half; }
};

// The part of delta that the caller does not know; see MapBackwardTensors.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_row_terms_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                         const RowStatistics<float> statistics) {
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim), lane = lane_index(), warp_row = 16 * warp_index();
  const ChunkedTile<T> query_tile(memory, 0, chunks), key_tile(memory, 1, chunks);
  const RowBlock<T> block(p, blockIdx.x);
  const int64_t row = block.row;
  const MapScore<float> score(p, block.batch, block.head);
  const WeightGradients<T> source(p, t, block.batch, block.head);
  const Rows<T> key = block.key(p);
  const BackwardRows<float> rows(p, t, statistics, score.batch_head, row);

  float sum[2] = {};
  const KeySteps steps(score, row, block.row_end);
  if (steps.count > 0) {
    query_tile.copy(block.query(p), row);
    key_tile.copy(key, steps.begin);
  }
  ptx::cp_async_commit();
  for (int step = 0; step < steps.count; ++step) {
    const int64_t first = steps.begin + int64_t{step} * kMapTile;
    ptx::cp_async_wait<0>();
    __syncthreads();
    MapAccumulators x = {};
    multiply_chunks(x, query_tile, warp_row, key_tile);
    __syncthreads();
    if (step + 1 < steps.count) key_tile.copy(key, first + kMapTile);
    ptx::cp_async_commit();

    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + lane / 4 + 8 * half;
      const BackwardRow<float> stats = rows[r];
      float scores[1][kMapLaneKeys], gradient[kMapLaneKeys] = {}, of_tile = 0;
      scores_of_row(scores, x, half, score, row + r, first, tested);
      source.add_unknown(gradient, row + r, LaneKeys{first});
#pragma unroll
      for (int i = 0; i < kMapLaneKeys; ++i) of_tile += gradient[i] * stats.weight(scores[0][i]);
      sum[half] += of_tile;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + warp_row + lane / 4 + 8 * half, place = score.batch_head * p.query_length + r;
    const float total = row_sum(sum[half]);
    if (lane % 4 != 0 || r >= p.query_length) continue;
    statistics.delta[place] += total;
    static_cast<float*>(t.row_terms)[place] = -statistics.delta[place];
  }
}

// Adds to result[c] the product of x with chunk (first chunk + c) of b's columns.
template <class T>
TA_DEVICE void multiply_columns_of(float (&result)[kChunks][1][kMapGroups][4], const MapAccumulators& x,
                                   const ChunkedTile<T>& b, int first_chunk) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (first_chunk + c < b.count) multiply<1, kChunkColumns>(result[c], x, b.chunk[first_chunk + c], 0);
}

// The block's result to a gradient, through the warp's rows of a tile that is read no more.
template <class T>
TA_DEVICE void store_columns(const Rows<T>& to, int64_t row, int first_chunk,
                             const float (&result)[kChunks][1][kMapGroups][4], const ChunkedTile<T>& tile) {
  const float one[1][2] = {{1.0f, 1.0f}};
  const int warp_row = 16 * warp_index();
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (first_chunk + c < tile.count)
      store_rows<1, kChunkColumns>(to, row + warp_row, (first_chunk + c) * kChunkColumns, result[c], one, tile.chunk[c],
                                   warp_row);
}

// One block per 64 query rows and kChunks · 64 columns of the gradient.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_query_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                              const RowStatistics<float> statistics) {
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim), lane = lane_index(), warp_row = 16 * warp_index();
  const int parts = static_cast<int>(ceil_div(chunks, kChunks)), first_chunk = blockIdx.x % parts * kChunks;
  const ChunkedTile<T> query_tile(memory, 0, chunks);
  const RowBlock<T> block(p, blockIdx.x / parts);
  const int64_t row = block.row;
  const MapScore<float> score(p, block.batch, block.head);
  const WeightGradients<T> source(p, t, block.batch, block.head);
  const Rows<T> key = block.key(p);
  const BackwardRows<float> rows(p, t, statistics, score.batch_head, row);

  float grad_slope[2] = {}, result[kChunks][1][kMapGroups][4] = {};
  const KeySteps steps(score, row, block.row_end);
  if (steps.count > 0) {
    query_tile.copy(block.query(p), row);
    ChunkedTile<T>(memory, 1, chunks).copy(key, steps.begin);
  }
  ptx::cp_async_commit();
  for (int step = 0; step < steps.count; ++step) {
    const int64_t first = steps.begin + int64_t{step} * kMapTile;
    const ChunkedTile<T> key_tile(memory, 1 + step % 2, chunks);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tile has landed, and the last step's is read no more
    if (step + 1 < steps.count) ChunkedTile<T>(memory, 2 - step % 2, chunks).copy(key, first + kMapTile);
    ptx::cp_async_commit();

    MapAccumulators x = {};
    multiply_chunks(x, query_tile, warp_row, key_tile);
    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + lane / 4 + 8 * half;
      float scores[1][kMapLaneKeys], gradient[kMapLaneKeys];
      scores_of_row(scores, x, half, score, row + r, first, tested);
      source.of_scores(gradient, score, rows[r], row + r, LaneKeys{first}, scores[0]);
      const float to_first = static_cast<float>(first - score.band.position(row + r));
#pragma unroll
      for (int i = 0; i < kMapLaneKeys; ++i) {
        float& element = x[0][i / 2][2 * half + i % 2];  // capped
        if (t.grad_alibi_slopes)
          grad_slope[half] -= gradient[i] * fabsf(to_first + static_cast<float>(column_of_lane(i)));
        element = gradient[i] * score.mod.capped_derivative(element);
      }
    }
    if (t.grad_query.defined()) multiply_columns_of(result, x, key_tile, first_chunk);
  }

  if (t.grad_alibi_slopes && first_chunk == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + warp_row + lane / 4 + 8 * half;
      const float total = row_sum(grad_slope[half]);
      if (lane % 4 == 0 && r < p.query_length) statistics.grad_slope[score.batch_head * p.query_length + r] = total;
    }
  }
  if (t.grad_query.defined())
    store_columns(Rows<T>(t.grad_query, block.batch, block.head, p.query_length, p.head_dim), row, first_chunk, result,
                  query_tile);
}

// One block per 64 keys of a key/value head and kChunks · 64 columns of the gradient, through the rows of all query
// heads that read it. Tiles are transposed, rows are keys.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_key_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                            const RowStatistics<float> statistics) {
  TA_DYNAMIC_SHARED(memory);
  const int chunks = chunks_of(p.head_dim), lane = lane_index(), warp_row = 16 * warp_index();
  const int parts = static_cast<int>(ceil_div(chunks, kChunks)), first_chunk = blockIdx.x % parts * kChunks;
  const ChunkedTile<T> key_tile(memory, 0, chunks);
  int64_t index = blockIdx.x / parts;
  const int64_t tiles = ceil_div(p.key_length, kMapTile), first = index % tiles * kMapTile;
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const int64_t lane_key = first + warp_row + lane / 4;  // and the one eight below

  RowSteps<kMapTile> step(p, kv_head,
                          MapScore<float>(p, batch, kv_head * p.group_size()).rows_of_any(first, first + kMapTile));
  const auto copy_step = [&](const ChunkedTile<T>& tile) {
    tile.copy(Rows<T>(p.query, batch, step.head, p.query_length, p.head_dim), step.row);
  };
  if (!step.done()) {
    key_tile.copy(Rows<T>(p.key, batch, kv_head, p.key_length, p.head_dim), first);
    copy_step(ChunkedTile<T>(memory, 1, chunks));
  }
  ptx::cp_async_commit();

  float result[kChunks][1][kMapGroups][4] = {};
  for (int buffer = 0; !step.done(); buffer ^= 1) {
    const int64_t row = step.row;
    const MapScore<float> score(p, batch, step.head);
    const WeightGradients<T> source(p, t, batch, step.head);
    const BackwardRows<float> rows(p, t, statistics, score.batch_head, row);
    const ChunkedTile<T> query_tile(memory, 1 + buffer, chunks);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tile has landed, and the last step's is read no more
    step.advance();
    if (!step.done()) copy_step(ChunkedTile<T>(memory, 2 - buffer, chunks));
    ptx::cp_async_commit();

    MapAccumulators x = {};
    multiply_chunks(x, key_tile, warp_row, query_tile);
    const bool tested = !score.inside(row, row + kMapTile, first, first + kMapTile);
    float scores[2][1][kMapLaneKeys];
#pragma unroll
    for (int half = 0; half < 2; ++half) scores_of_key(scores[half], x, half, score, lane_key + 8 * half, row, tested);
#pragma unroll
    for (int i = 0; i < kMapLaneKeys; ++i) {
      const int r = column_of_lane(i);
      const float of_keys[2] = {scores[0][0][i], scores[1][0][i]};
      float gradient[2];
      source.of_scores(gradient, score, rows[r], row + r, LaneKeyRows{lane_key}, of_keys);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& element = x[0][i / 2][2 * half + i % 2];
        element = gradient[half] * score.mod.capped_derivative(element);
      }
    }
    multiply_columns_of(result, x, query_tile, first_chunk);
  }
  store_columns(Rows<T>(t.grad_key, batch, kv_head, p.key_length, p.head_dim), first, first_chunk, result, key_tile);
}

template <class T>
void map_row_terms(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_row_terms_kernel<T>, p.batch * p.heads * map_tiles(p.query_length), kThreads,
         chunked_bytes<T>(p.head_dim, 2), stream, p, t, RowStatistics<float>(p, workspace));
}

// Blocks of one gradient, of tiles of rows in so many heads.
inline int64_t gradient_blocks(const AttentionProblem& p, int64_t heads, int64_t length) {
  constexpr int64_t kColumns = kChunks * kChunkColumns;
  return p.batch * heads * map_tiles(length) * ((p.head_dim + kColumns - 1) / kColumns);
}

template <class T>
void map_query_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_query_gradient_kernel<T>, gradient_blocks(p, p.heads, p.query_length), kThreads,
         chunked_bytes<T>(p.head_dim, 3), stream, p, t, RowStatistics<float>(p, workspace));
}

template <class T>
void map_key_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_key_gradient_kernel<T>, gradient_blocks(p, p.kv_heads, p.key_length), kThreads,
         chunked_bytes<T>(p.head_dim, 3), stream, p, t, RowStatistics<float>(p, workspace));
}

}  // namespace torch_attn::cuda::sm80
