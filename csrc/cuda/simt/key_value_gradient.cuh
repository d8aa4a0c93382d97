// grad_key and grad_value: one block per 64 keys of a key/value head and kColumns columns of the gradients. It goes
// through the query rows of all query heads that read the head, so nothing is added by atomics. Tiles are transposed: a
// thread's rows are keys, and x runs over queries.
#pragma once

#include "../row_statistics.cuh"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    key_value_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                              const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kColumns>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, kTile);
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const int64_t chunks = ceil_div(widest > 0 ? widest : 1, kColumns);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kColumns;
  index /= chunks;
  const int64_t first = index % tiles * kTile;  // the keys [first, first + kTile)
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const int64_t queries = p.queries_of(batch), keys = p.keys_of(batch);
  const int64_t first_query = p.first_query(batch), first_key = p.first_key(batch);
  if (first >= keys) return;  // of a packed sequence shorter than others
  const bool want_key = t.grad_key.defined() && column < p.head_dim;
  const bool want_value = t.grad_value.defined() && column < p.value_dim;

  const Rows<T> key(p.key, batch, kv_head, keys, p.head_dim, first_key);
  const Rows<T> value(p.value, batch, kv_head, keys, p.value_dim, first_key);
  Real grad_key[kPerThread][kColumns / kSide] = {}, grad_value[kPerThread][kColumns / kSide] = {};
  Real keep_scale[kPerThread];

  for (int64_t head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
    const HeadScore<Real> score(p, batch, head);
    const Rows<T> query(p.query, batch, head, queries, p.head_dim, first_query);
    const Rows<T> grad_out(t.grad_out, batch, head, queries, p.value_dim, first_query);
    const RowRange range = score.rows_of_any(first, first + kTile);
    for (int64_t row = range.begin / kTile * kTile; row < range.end; row += kTile) {
      const int64_t row_end = row + kTile < queries ? row + kTile : queries;
      Real dot[kPerThread][kPerThread] = {}, grad_weight[kPerThread][kPerThread] = {};
      multiply_transposed(dot, shared, key, first, query, row);
      if (want_key) multiply_transposed(grad_weight, shared, value, first, grad_out, row);
      const bool tested = !score.unmasked(row, row_end, first, first + kTile);
      const BackwardRows<Real> rows(score, t, statistics, row);
      const uint32_t kept = score.dropout_on ? kept_of_key_rows(score, first + thread_y() * kPerThread, row) : ~0u;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t r = row + thread_x() + kSide * j;
        const BackwardRow<Real> stats = rows[thread_x() + kSide * j];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const int64_t k = first + thread_y() * kPerThread + i;
          const Real capped = score.mod.capped(dot[i][j]);
          const Real weight = stats.weight(score.score(capped, r, k, tested));
          const Real grad_score =
              weight * (score.dropped(grad_weight[i][j], is_kept_of_key_rows(kept, i, j)) - stats.delta);
          dot[i][j] = grad_score * score.mod.capped_derivative(capped);
          shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
              is_kept_of_key_rows(kept, i, j) ? weight : 0;
        }
      }
      if (want_value) multiply(grad_value, shared, grad_out, row, column);
      if (want_key) {
        __syncthreads();  // the weights are read no more
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
          for (int j = 0; j < kPerThread; ++j)
            shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] = dot[i][j];
        multiply(grad_key, shared, query, row, column);
      }
    }
  }

  const Real scale = p.dropout_p > 0 ? static_cast<Real>(Dropout::keep_scale(p.dropout_p)) : Real(1);
  const Real one[kPerThread] = {1, 1, 1, 1};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) keep_scale[i] = scale;
  if (want_key) store_rows<T>(t.grad_key, batch, kv_head, first, keys, column, p.head_dim, grad_key, one, first_key);
  if (want_value)
    store_rows<T>(t.grad_value, batch, kv_head, first, keys, column, p.value_dim, grad_value, keep_scale, first_key);
}

template <class T, int kColumns>
void key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const int64_t chunks = widest > 0 ? (widest + kColumns - 1) / kColumns : 1;
  const int64_t tiles = (p.key_length + kTile - 1) / kTile;
  launch(key_value_gradient_kernel<T, kColumns>, p.batch * p.kv_heads * tiles * chunks, kThreads,
         sizeof(Shared<Accumulator<T>, kColumns>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
