// attention_weights from a known logsumexp: one block per 64 x 64 tile of the map. For the mean over heads the block
// goes through the heads and adds in registers, so that nothing of the size of all heads' weights exists.
#pragma once

#include "../launch.h"
#include "map_tile.cuh"

namespace torch_attn::cuda::simt {

template <class T>
__global__ void __launch_bounds__(kThreads)
    map_weights_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ WeightsOutputs out,
                       const Accumulator<T>* weight_scale) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<MapShared<Real>*>(memory);

  const int64_t key_tiles = ceil_div(p.key_length, kTile), row_tiles = ceil_div(p.query_length, kTile);
  const int64_t heads = out.mean ? 1 : p.heads;  // of the output
  int64_t index = blockIdx.x;
  const int64_t first = index % key_tiles * kTile;
  index /= key_tiles;
  const int64_t row = index % row_tiles * kTile;
  index /= row_tiles;
  const int64_t out_head = index % heads, batch = index / heads;
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;

  Real sum[kPerThread][kPerThread] = {};
  const int64_t head_end = out.mean ? p.heads : out_head + 1;
  for (int64_t head = out_head; head < head_end; ++head) {
    const MapScore<Real> score(p, batch, head);
    const KeyRange range = score.band.keys_of_any(row, row_end);
    if (range.empty() || first >= range.end || first + kTile <= range.begin) break;  // the same for every head
    const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
    const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
    const WeightRows<Real> rows(p, out.logsumexp, weight_scale, score.batch_head, row);
    Real dot[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const BackwardRow<Real> stats = rows[thread_y() * kPerThread + i];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j)
        sum[i][j] += stats.weight(score.score(score.mod.capped(dot[i][j]), row + thread_y() * kPerThread + i,
                                              first + thread_x() + kSide * j, tested));
    }
  }

  const Real factor = out.mean ? Real(1) / static_cast<Real>(p.heads) : Real(1);
  const TensorView& view = out.weights;
  T* const to = static_cast<T*>(view.data) + batch * view.stride[0] + out_head * view.stride[1];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = row + thread_y() * kPerThread + i;
    if (r >= p.query_length) continue;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t k = first + thread_x() + kSide * j;
      if (k < p.key_length) store(to + r * view.stride[2] + k, sum[i][j] * factor);
    }
  }
}

template <class T>
void map_weights(const AttentionProblem& p, const WeightsOutputs& out, void* workspace, const Stream& stream) {
  using Real = Accumulator<T>;
  launch<AttentionProblem, WeightsOutputs, const Real*>(
      map_weights_kernel<T>, p.batch * (out.mean ? 1 : p.heads) * tiles_of(p.query_length) * tiles_of(p.key_length),
      kThreads, sizeof(MapShared<Real>), stream, p, out, static_cast<const Real*>(workspace));
}

}  // namespace torch_attn::cuda::simt
