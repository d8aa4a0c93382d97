// attention_statistics: one walk over the keys for everything a row knows of its weights, one block per 64 query rows;
// then, for the sums of columns, which need logsumexp, one block per 64 keys, which goes through the rows in a fixed
// order.
#pragma once

#include "../launch.h"
#include "map_tile.cuh"

namespace torch_attn::cuda::simt {

// The keys of each row's highest scores, kept while keys stream by in ascending order. The lists lie where the results
// are to be, scores in the place of weights; each belongs to one of the block's first 64 threads.
template <class Real>
struct TopList {
  Real* scores;  // null: this thread has no row
  int64_t* keys;
  int64_t count;

  TA_DEVICE TopList(const StatisticsOutputs& out, int64_t first, int64_t rows)  // first: the block's, of (B, Hq, L)
      : scores(nullptr), keys(nullptr), count(out.top_k) {
    if (count == 0 || threadIdx.x >= rows) return;
    scores = static_cast<Real*>(out.top_weights) + (first + threadIdx.x) * count;
    keys = out.top_indices + (first + threadIdx.x) * count;
    for (int64_t i = 0; i < count; ++i) scores[i] = Math<Real>::negative_infinity(), keys[i] = -1;
  }

  // The scores of the keys from `key` on, in a row of shared memory.
  TA_DEVICE void add(const Real* row, int64_t key) const {
    Real lowest = scores[count - 1];
#pragma unroll 1
    for (int j = 0; j < kTile; j += Vector<Real>::kWidth) {
      const Vector<Real> newcomers = load_vector(row + j);
#pragma unroll
      for (int e = 0; e < Vector<Real>::kWidth; ++e) {
        if (!(newcomers.lane[e] > lowest)) continue;
        insert(newcomers.lane[e], key + j + e);
        lowest = scores[count - 1];
      }
    }
  }
  // Scores become weights.
  TA_DEVICE void finish(Real maximum, Real factor) const {
    for (int64_t i = 0; i < count; ++i)
      scores[i] = keys[i] < 0 ? Real(0) : Math<Real>::exp(scores[i] - maximum) * factor;
  }

 private:
  TA_DEVICE void insert(Real score, int64_t key) const {
    int64_t place = count - 1;
    for (; place > 0 && scores[place - 1] < score; --place) {
      scores[place] = scores[place - 1];
      keys[place] = keys[place - 1];
    }
    scores[place] = score;
    keys[place] = key;
  }
};

TA_DEVICE int64_t row_min(int64_t x) {
#pragma unroll
  for (int step = 1; step < kSide; step *= 2) {
    const int64_t other = __shfl_xor_sync(~0u, x, step);
    x = other < x ? other : x;
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    map_statistics_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ StatisticsOutputs out,
                          Accumulator<T>* weight_scale) {
  using Real = Accumulator<T>;
  using M = Math<Real>;
  using Softmax = OnlineSoftmax<M>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile);
  const int64_t row = (tiles - 1 - blockIdx.x % tiles) * kTile;  // the longest rows of a causal mask first
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
  const MapScore<Real> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const int64_t first_row = score.batch_head * p.query_length + row;
  const TopList<Real> top(out, first_row, row_end - row);
  const Real window = static_cast<Real>(out.mass_window);

  // Each thread gathers its own keys; the 16 that share a row meet at the end.
  Real maximum[kPerThread];
  RowSums<M> sums[kPerThread];
  int64_t best[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    maximum[i] = M::negative_infinity();
    sums[i] = RowSums<M>::zero();
    best[i] = -1;
  }

  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real tile[kPerThread][kPerThread] = {};
    multiply_transposed(tile, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      Real highest = maximum[i];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t k = first + thread_x() + kSide * j;
        tile[i][j] = score.score(score.mod.capped(tile[i][j]), r, k, tested);
        if (tile[i][j] > highest) highest = tile[i][j], best[i] = k;
      }
      sums[i].rescale(maximum[i], highest);
      maximum[i] = highest;
      const Real subtracted = Softmax::safe_maximum(highest);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
        sums[i].add(tile[i][j] - subtracted, score.distance(r, first + thread_x() + kSide * j), window);
    }
    if (out.top_k > 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j)
          shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] = tile[i][j];
      __syncthreads();
      if (top.scores) top.add(shared.weights + threadIdx.x * shared.kWeightPitch, first);
    }
  }

  __syncthreads();  // the stage is read no more
  const Real sink = p.sinks.defined() ? per_head<Real>(p.sinks, batch, head) : M::negative_infinity();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const Real highest = row_max(maximum[i]);
    const int64_t lowest_key = row_min(maximum[i] == highest && best[i] >= 0 ? best[i] : INT64_MAX);
    sums[i].rescale(maximum[i], highest);
    const RowSums<M> total = {row_sum(sums[i].sum), row_sum(sums[i].score_sum), row_sum(sums[i].distance_sum),
                              row_sum(sums[i].window_sum)};
    const int in_block = thread_y() * kPerThread + i;
    if (thread_x() != 0 || row + in_block >= p.query_length) continue;
    const auto of_row = torch_attn::RowStatistics<M>::of(highest, total, sink);
    write_statistics(out, weight_scale, first_row + in_block, of_row, highest,
                     lowest_key == INT64_MAX ? -1 : lowest_key);
    shared.stage[in_block] = highest;
    shared.stage[kTile + in_block] = of_row.factor;
  }
  if (out.top_k == 0) return;
  __syncthreads();
  if (top.scores) top.finish(shared.stage[threadIdx.x], shared.stage[kTile + threadIdx.x]);
}

// Tiles are transposed: a thread's rows are keys, and x runs over queries.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_column_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ StatisticsOutputs out,
                      const Accumulator<T>* weight_scale) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, kTile), first = blockIdx.x % tiles * kTile;
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const MapScore<Real> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);

  Real sum[kPerThread] = {};
  const RowRange range = score.rows_of_any(first, first + kTile);
  for (int64_t row = range.begin / kTile * kTile; row < range.end; row += kTile) {
    const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
    Real dot[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, key, first, query, row);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
    const WeightRows<Real> rows(p, out.logsumexp, weight_scale, score.batch_head, row);
    Real of_tile[kPerThread] = {};  // apart, so that a long sum loses fewer digits
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const BackwardRow<Real> stats = rows[thread_x() + kSide * j];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        of_tile[i] += stats.weight(score.score(score.mod.capped(dot[i][j]), row + thread_x() + kSide * j,
                                               first + thread_y() * kPerThread + i, tested));
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum[i] += of_tile[i];
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t k = first + thread_y() * kPerThread + i;
    const Real total = row_sum(sum[i]);
    if (thread_x() == 0 && k < p.key_length)
      static_cast<Real*>(out.column_sum)[score.batch_head * p.key_length + k] = total;
  }
}

template <class T>
void map_statistics(const AttentionProblem& p, const StatisticsOutputs& out, void* workspace, const Stream& stream) {
  using Real = Accumulator<T>;
  Real* const weight_scale = static_cast<Real*>(workspace);
  launch(map_statistics_kernel<T>, p.batch * p.heads * tiles_of(p.query_length), kThreads, sizeof(MapShared<Real>),
         stream, p, out, weight_scale);
  if (out.column_sum)
    launch<AttentionProblem, StatisticsOutputs, const Real*>(map_column_kernel<T>,
                                                             p.batch * p.heads * tiles_of(p.key_length), kThreads,
                                                             sizeof(MapShared<Real>), stream, p, out, weight_scale);
}

}  // namespace torch_attn::cuda::simt
