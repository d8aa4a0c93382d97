// The forward pass of the portable tier: one block per 64 query rows and kColumns columns of the output.
#pragma once

#include "../launch.h"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out) {
  using Real = Accumulator<T>;
  using Softmax = OnlineSoftmax<Math<Real>>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kColumns>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, kTile), chunks = ceil_div(p.value_dim > 0 ? p.value_dim : 1, kColumns);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kColumns;
  index /= chunks;
  const int64_t row = (tiles - 1 - index % tiles) * kTile;  // the longest rows of a causal mask first
  index /= tiles;
  const int64_t head = index % p.heads, batch = index / p.heads;
  const int64_t queries = p.queries_of(batch);
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int64_t row_end = row + kTile < queries ? row + kTile : queries;

  const HeadScore<Real> score(p, batch, head);
  const int64_t kv_head = head / p.group_size();
  const Rows<T> query(p.query, batch, head, queries, p.head_dim, p.first_query(batch));
  // What lies behind the last key is not read: in a paged cache, neither rows nor pages need be valid there.
  const int64_t keys = score.band.key_length;
  const KeyRows<T> key(p.key, batch, kv_head, keys, p.head_dim, p.first_key(batch));
  const KeyRows<T> value(p.value, batch, kv_head, keys, p.value_dim, p.first_key(batch));

  // A sink is a score seen before the first key, which adds to the sum and not to the output.
  const Real sink = p.sinks.defined() ? per_head<Real>(p.sinks, batch, head) : Math<Real>::negative_infinity();
  Real maximum[kPerThread], sum[kPerThread], result[kPerThread][kColumns / kSide] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    maximum[i] = sink;
    sum[i] = Math<Real>::exp(sink - Softmax::safe_maximum(sink));
  }

  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real weight[kPerThread][kPerThread] = {};
    multiply_transposed(weight, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
    const uint32_t kept = score.dropout_on ? kept_of_rows(score, row + thread_y() * kPerThread, first) : ~0u;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      Real largest = maximum[i];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        weight[i][j] = score.score(score.mod.capped(weight[i][j]), r, first + thread_x() + kSide * j, tested);
        largest = weight[i][j] > largest ? weight[i][j] : largest;
      }
      largest = row_max(largest);
      const Real rescale = Softmax::rescale(maximum[i], largest), safe = Softmax::safe_maximum(largest);
      maximum[i] = largest;
      Real partial = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const Real w = Math<Real>::exp(weight[i][j] - safe);
        partial += w;
        shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
            kept >> (8 * j + i) & 1 ? w : 0;
      }
      sum[i] = sum[i] * rescale + row_sum(partial);
#pragma unroll
      for (int c = 0; c < kColumns / kSide; ++c) result[i][c] *= rescale;
    }
    multiply(result, shared, value, first, column);
  }

  Real factor[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    factor[i] = Softmax::inverse_sum(sum[i]) * (score.dropout_on ? score.keep_scale : Real(1));
    const int64_t r = row + thread_y() * kPerThread + i;
    if (column == 0 && thread_x() == 0 && r < queries)
      static_cast<Real*>(out.logsumexp)[score.first_row + r] = Softmax::logsumexp(maximum[i], sum[i]);
  }
  store_rows<T>(out.out, batch, head, row, queries, column, p.value_dim, result, factor, p.first_query(batch));
}

template <class T, int kColumns>
void forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  const int64_t chunks = p.value_dim > 0 ? (p.value_dim + kColumns - 1) / kColumns : 1;
  const int64_t tiles = (p.query_length + kTile - 1) / kTile;
  launch(forward_kernel<T, kColumns>, p.batch * p.heads * tiles * chunks, kThreads,
         sizeof(Shared<Accumulator<T>, kColumns>), stream, p, out);
}

}  // namespace torch_attn::cuda::simt
