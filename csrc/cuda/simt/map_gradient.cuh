// The backward pass of attention maps: attention's own, with another gradient of the weights, and before it a pass for
// what a caller cannot know of a row, the sum of its weights times the dense part of that gradient. Included by
// instantiate/map_*.cu.
#pragma once

#include "../launch.h"
#include "../weight_gradients.cuh"
#include "map_tile.cuh"
#include "mask_gradient.cuh"

namespace torch_attn::cuda::simt {

// The keys of a thread in a row of its tile.
struct KeysOfRow {
  int64_t first;
  int step;
  TA_DEVICE int offset(int n) const { return step * n; }
};

// One block per 64 rows: the rest of delta.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_row_terms_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                         const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile);
  const int64_t row = (tiles - 1 - blockIdx.x % tiles) * kTile;
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
  const MapScore<Real> score(p, batch, head);
  const WeightGradients<T> source(p, t, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const BackwardRows<Real> rows(p, t, statistics, score.batch_head, row);

  Real sum[kPerThread] = {};
  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real dot[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      const BackwardRow<Real> stats = rows[thread_y() * kPerThread + i];
      Real gradient[kPerThread] = {}, of_tile = 0;
      source.add_unknown(gradient, r, KeysOfRow{first + thread_x(), kSide});
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
        of_tile += gradient[j] *
                   stats.weight(score.score(score.mod.capped(dot[i][j]), r, first + thread_x() + kSide * j, tested));
      sum[i] += of_tile;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int in_block = thread_y() * kPerThread + i;
    const Real total = row_sum(sum[i]);
    if (thread_x() != 0 || row + in_block >= p.query_length) continue;
    const int64_t place = score.batch_head * p.query_length + row + in_block;
    statistics.delta[place] += total;
    static_cast<Real*>(t.row_terms)[place] = -statistics.delta[place];
  }
}

// One block per 64 query rows and 64 columns of the gradient.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_query_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                              const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile), chunks = p.head_dim > kTile ? ceil_div(p.head_dim, kTile) : 1;
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kTile;
  index /= chunks;
  const int64_t row = (tiles - 1 - index % tiles) * kTile;
  index /= tiles;
  const int64_t head = index % p.heads, batch = index / p.heads;
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
  const MapScore<Real> score(p, batch, head);
  const WeightGradients<T> source(p, t, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const BackwardRows<Real> rows(p, t, statistics, score.batch_head, row);

  Real grad_slope[kPerThread] = {}, result[kPerThread][kPerThread] = {};
  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real dot[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i, k = first + thread_x();
      Real scores[kPerThread], gradient[kPerThread];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        dot[i][j] = score.mod.capped(dot[i][j]);
        scores[j] = score.score(dot[i][j], r, k + kSide * j, tested);
      }
      source.of_scores(gradient, score, rows[thread_y() * kPerThread + i], r, KeysOfRow{k, kSide}, scores);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        if (t.grad_alibi_slopes) grad_slope[i] += gradient[j] * score.alibi_derivative(r, k + kSide * j);
        shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
            gradient[j] * score.mod.capped_derivative(dot[i][j]);
      }
    }
    if (t.grad_query.defined()) multiply(result, shared, key, first, column);
  }

  if (t.grad_alibi_slopes && column == 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      const Real total = row_sum(grad_slope[i]);
      if (thread_x() == 0 && r < p.query_length) statistics.grad_slope[score.batch_head * p.query_length + r] = total;
    }
  }
  const Real one[kPerThread] = {1, 1, 1, 1};
  if (t.grad_query.defined())
    store_rows<T>(t.grad_query, batch, head, row, p.query_length, column, p.head_dim, result, one);
}

// One block per 64 keys of a key/value head and 64 columns of the gradient, through the rows of all query heads that
// read it. Tiles are transposed: a thread's rows are keys, and x runs over queries.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_key_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                            const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, kTile), chunks = p.head_dim > kTile ? ceil_div(p.head_dim, kTile) : 1;
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kTile;
  index /= chunks;
  const int64_t first = index % tiles * kTile;  // the keys [first, first + kTile)
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const Rows<T> key(p.key, batch, kv_head, p.key_length, p.head_dim);

  Real result[kPerThread][kPerThread] = {};
  for (int64_t head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
    const MapScore<Real> score(p, batch, head);
    const WeightGradients<T> source(p, t, batch, head);
    const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
    const RowRange range = score.rows_of_any(first, first + kTile);
    for (int64_t row = range.begin / kTile * kTile; row < range.end; row += kTile) {
      const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
      Real dot[kPerThread][kPerThread] = {};
      multiply_transposed(dot, shared, key, first, query, row);
      const bool tested = !score.unmasked(row, row_end, first, first + kTile);
      const BackwardRows<Real> rows(p, t, statistics, score.batch_head, row);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t r = row + thread_x() + kSide * j, k = first + thread_y() * kPerThread;
        Real scores[kPerThread], gradient[kPerThread];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          dot[i][j] = score.mod.capped(dot[i][j]);
          scores[i] = score.score(dot[i][j], r, k + i, tested);
        }
        source.of_scores(gradient, score, rows[thread_x() + kSide * j], r, KeysOfRow{k, 1}, scores);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
          shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
              gradient[i] * score.mod.capped_derivative(dot[i][j]);
      }
      multiply(result, shared, query, row, column);
    }
  }
  const Real one[kPerThread] = {1, 1, 1, 1};
  store_rows<T>(t.grad_key, batch, kv_head, first, p.key_length, column, p.head_dim, result, one);
}

// The blocks of mask_gradient.cuh.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_mask_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                             const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const MaskBlock block(p, t.grad_attn_mask);
  Real sum[kPerThread][kPerThread] = {};
  for (int64_t batch = block.batches.begin; batch < block.batches.end; ++batch) {
    for (int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      const MapScore<Real> score(p, batch, head);
      const WeightGradients<T> source(p, t, batch, head);
      const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
      const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
      for (int64_t row = block.rows.begin; row < block.rows.end; row += kTile) {
        const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
        const BackwardRows<Real> rows(p, t, statistics, score.batch_head, row);
        const KeyRange attended = score.band.keys_of_any(row, row_end);
        for (int64_t first = block.keys.begin; first < block.keys.end; first += kTile) {
          if (first >= attended.end || first + kTile <= attended.begin) continue;
          Real dot[kPerThread][kPerThread] = {};
          multiply_transposed(dot, shared, query, row, key, first);
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            const int64_t r = row + thread_y() * kPerThread + i, k = first + thread_x();
            Real scores[kPerThread], gradient[kPerThread];
#pragma unroll
            for (int j = 0; j < kPerThread; ++j)
              scores[j] = score.score(score.mod.capped(dot[i][j]), r, k + kSide * j, true);
            source.of_scores(gradient, score, rows[thread_y() * kPerThread + i], r, KeysOfRow{k, kSide}, scores);
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) sum[i][j] += gradient[j];
          }
        }
      }
    }
  }
  store_mask_gradient(block, t.grad_attn_mask, shared, sum);
}

template <class T>
void map_row_terms(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_row_terms_kernel<T>, p.batch * p.heads * tiles_of(p.query_length), kThreads,
         sizeof(MapShared<Accumulator<T>>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

template <class T>
void map_query_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_query_gradient_kernel<T>, p.batch * p.heads * tiles_of(p.query_length) * chunks_of(p.head_dim), kThreads,
         sizeof(MapShared<Accumulator<T>>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

template <class T>
void map_key_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_key_gradient_kernel<T>, p.batch * p.kv_heads * tiles_of(p.key_length) * chunks_of(p.head_dim), kThreads,
         sizeof(MapShared<Accumulator<T>>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

template <class T>
void map_mask_gradient(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         sizeof(MapShared<Accumulator<T>>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
