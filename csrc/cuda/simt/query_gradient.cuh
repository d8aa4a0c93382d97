// grad_query, and each row's part of grad_alibi_slopes: one block per 64 query rows and kColumns columns of the
// gradient.
#pragma once

#include "../row_statistics.cuh"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    query_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                          const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kColumns>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile), chunks = ceil_div(p.head_dim > 0 ? p.head_dim : 1, kColumns);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kColumns;
  index /= chunks;
  const int64_t row = (tiles - 1 - index % tiles) * kTile;
  index /= tiles;
  const int64_t head = index % p.heads, batch = index / p.heads;
  const int64_t queries = p.queries_of(batch), keys = p.keys_of(batch);
  const int64_t first_query = p.first_query(batch), first_key = p.first_key(batch);
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int64_t row_end = row + kTile < queries ? row + kTile : queries;

  const HeadScore<Real> score(p, batch, head);
  const int64_t kv_head = head / p.group_size();
  const Rows<T> query(p.query, batch, head, queries, p.head_dim, first_query);
  const Rows<T> key(p.key, batch, kv_head, keys, p.head_dim, first_key);
  const Rows<T> value(p.value, batch, kv_head, keys, p.value_dim, first_key);
  const Rows<T> grad_out(t.grad_out, batch, head, queries, p.value_dim, first_query);

  const BackwardRows<Real> tile_rows(score, t, statistics, row);
  BackwardRow<Real> rows[kPerThread];
  Real grad_slope[kPerThread] = {}, result[kPerThread][kColumns / kSide] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) rows[i] = tile_rows[thread_y() * kPerThread + i];

  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real dot[kPerThread][kPerThread] = {}, grad_weight[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, query, row, key, first);
    multiply_transposed(grad_weight, shared, grad_out, row, value, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
    const uint32_t kept = score.dropout_on ? kept_of_rows(score, row + thread_y() * kPerThread, first) : ~0u;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t k = first + thread_x() + kSide * j;
        const Real capped = score.mod.capped(dot[i][j]);
        const Real weight = rows[i].weight(score.score(capped, r, k, tested));
        const Real grad_score = weight * (score.dropped(grad_weight[i][j], kept >> (8 * j + i) & 1) - rows[i].delta);
        if (t.grad_alibi_slopes) grad_slope[i] += grad_score * score.alibi_derivative(r, k);
        shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
            grad_score * score.mod.capped_derivative(capped);
      }
    }
    if (t.grad_query.defined()) multiply(result, shared, key, first, column);
  }

  if (t.grad_alibi_slopes && column == 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      const Real total = row_sum(grad_slope[i]);
      if (thread_x() == 0 && r < queries) statistics.grad_slope[score.first_row + r] = total;
    }
  }
  const Real one[kPerThread] = {1, 1, 1, 1};
  if (t.grad_query.defined())
    store_rows<T>(t.grad_query, batch, head, row, queries, column, p.head_dim, result, one, first_query);
}

template <class T, int kColumns>
void query_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  const int64_t chunks = p.head_dim > 0 ? (p.head_dim + kColumns - 1) / kColumns : 1;
  const int64_t tiles = (p.query_length + kTile - 1) / kTile;
  launch(query_gradient_kernel<T, kColumns>, p.batch * p.heads * tiles * chunks, kThreads,
         sizeof(Shared<Accumulator<T>, kColumns>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
