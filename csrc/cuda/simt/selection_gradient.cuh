// Hard attention's backward pass in the portable tier: query_gradient.cuh, key_value_gradient.cuh and mask_gradient.cuh
// with what log-probabilities, entropy and chosen scores pass back to a score in the place of soft attention's
// gradient.
#pragma once

#include "../../core/selection.h"
#include "mask_gradient.cuh"
#include "selection_variants.h"

namespace torch_attn::cuda::simt {

// One query row: SelectionBackwardTensors' coefficients beside BackwardRow's.
template <class Real>
struct SelectionRow : BackwardRow<Real> {
  Real log_weight_gradient = 0, log_scale = 0;
  const int64_t* indices = nullptr;
  const Real* chosen_gradient = nullptr;
  int64_t count = 0, key_length = 0;

  // Of a score that was not chosen.
  TA_DEVICE Real gradient(Real score) const {
    const Real log_weight = score - this->logsumexp;
    const Real weight = Math<Real>::exp(log_weight) * this->scale;
    if (weight == 0) return 0;  // log P may be −∞
    return weight * (log_weight_gradient * (log_weight + log_scale) - this->delta);
  }
  // Calls add(key − first, gradient) for each choice, not the sink, among the kTile keys from `first` on, always in the
  // same order.
  template <class Add>
  TA_DEVICE void for_chosen(int64_t first, Add add) const {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t place = indices[n] - first;
      if (place >= 0 && place < kTile && indices[n] < key_length) add(static_cast<int>(place), chosen_gradient[n]);
    }
  }
};

// A head's rows from `row` on.
template <class Real>
struct SelectionRows {
  BackwardRows<Real> rows;
  const Real* log_weight_gradient;  // null: zero
  const int64_t* indices;
  const Real* chosen_gradient;  // null: zero
  int64_t count, key_length;

  TA_DEVICE SelectionRows(const AttentionProblem& p, const SelectionBackwardTensors& t,
                          const RowStatistics<Real>& statistics, int64_t batch_head, int64_t row)
      : rows(p, t, statistics, batch_head, row),
        log_weight_gradient(static_cast<const Real*>(t.log_weight_gradient)),
        indices(t.indices),
        chosen_gradient(static_cast<const Real*>(t.chosen_gradient)),
        count(t.chosen_gradient ? t.count : 0),
        key_length(p.key_length) {
    const int64_t first = batch_head * p.query_length + row;
    if (log_weight_gradient) log_weight_gradient += first;
    if (count > 0) indices += first * count, chosen_gradient += first * count;
  }
  TA_DEVICE SelectionRow<Real> operator[](int i) const {
    SelectionRow<Real> row;
    static_cast<BackwardRow<Real>&>(row) = rows[i];
    if (i >= rows.left) return row;
    if (log_weight_gradient) row.log_weight_gradient = log_weight_gradient[i];
    if (row.scale != 1) row.log_scale = Math<Real>::log(row.scale);
    if (count > 0) row.indices = indices + i * count, row.chosen_gradient = chosen_gradient + i * count;
    row.count = count, row.key_length = key_length;
    return row;
  }
};

// grad_query, and each row's part of grad_alibi_slopes.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    selection_query_gradient_kernel(const __grid_constant__ AttentionProblem p,
                                    const __grid_constant__ SelectionBackwardTensors t,
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
  const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;

  const HeadScore<Real> score(p, batch, head);
  const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
  const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
  const SelectionRows<Real> rows(p, t, statistics, score.batch_head, row);
  Real grad_slope[kPerThread] = {}, result[kPerThread][kColumns / kSide] = {};

  const KeyRange range = score.band.keys_of_any(row, row_end);
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    Real dot[kPerThread][kPerThread] = {};
    multiply_transposed(dot, shared, query, row, key, first);
    const bool tested = !score.unmasked(row, row_end, first, first + kTile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t r = row + thread_y() * kPerThread + i;
      const SelectionRow<Real> stats = rows[thread_y() * kPerThread + i];
      Real grad_score[kPerThread];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        dot[i][j] = score.mod.capped(dot[i][j]);
        grad_score[j] = stats.gradient(score.score(dot[i][j], r, first + thread_x() + kSide * j, tested));
      }
      stats.for_chosen(first, [&](int place, Real gradient) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j)
          if (place == thread_x() + kSide * j) grad_score[j] += gradient;
      });
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int k = thread_x() + kSide * j;
        if (t.grad_alibi_slopes) grad_slope[i] += grad_score[j] * score.alibi_derivative(r, first + k);
        shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + k] =
            grad_score[j] * score.mod.capped_derivative(dot[i][j]);
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

// grad_key; tiles are transposed, as in key_value_gradient.cuh.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T>)
    selection_key_gradient_kernel(const __grid_constant__ AttentionProblem p,
                                  const __grid_constant__ SelectionBackwardTensors t,
                                  const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kColumns>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, kTile), chunks = ceil_div(p.head_dim > 0 ? p.head_dim : 1, kColumns);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % chunks) * kColumns;
  index /= chunks;
  const int64_t first = index % tiles * kTile;
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const Rows<T> key(p.key, batch, kv_head, p.key_length, p.head_dim);
  Real result[kPerThread][kColumns / kSide] = {};

  for (int64_t head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
    const HeadScore<Real> score(p, batch, head);
    const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
    const RowRange range = score.rows_of_any(first, first + kTile);
    for (int64_t row = range.begin / kTile * kTile; row < range.end; row += kTile) {
      const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
      Real dot[kPerThread][kPerThread] = {};
      multiply_transposed(dot, shared, key, first, query, row);
      const bool tested = !score.unmasked(row, row_end, first, first + kTile);
      const SelectionRows<Real> rows(p, t, statistics, score.batch_head, row);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t r = row + thread_x() + kSide * j;
        const SelectionRow<Real> stats = rows[thread_x() + kSide * j];
        Real grad_score[kPerThread];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          dot[i][j] = score.mod.capped(dot[i][j]);
          grad_score[i] = stats.gradient(score.score(dot[i][j], r, first + thread_y() * kPerThread + i, tested));
        }
        stats.for_chosen(first, [&](int place, Real gradient) {
#pragma unroll
          for (int i = 0; i < kPerThread; ++i)
            if (place == thread_y() * kPerThread + i) grad_score[i] += gradient;
        });
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
          shared.weights[(thread_y() * kPerThread + i) * shared.kWeightPitch + thread_x() + kSide * j] =
              grad_score[i] * score.mod.capped_derivative(dot[i][j]);
      }
      multiply(result, shared, query, row, column);
    }
  }
  const Real one[kPerThread] = {1, 1, 1, 1};
  store_rows<T>(t.grad_key, batch, kv_head, first, p.key_length, column, p.head_dim, result, one);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T>)
    selection_mask_gradient_kernel(const __grid_constant__ AttentionProblem p,
                                   const __grid_constant__ SelectionBackwardTensors t,
                                   const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Real, kTile>*>(memory);

  const MaskBlock block(p, t.grad_attn_mask);
  Real sum[kPerThread][kPerThread] = {};
  for (int64_t batch = block.batches.begin; batch < block.batches.end; ++batch) {
    for (int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      const HeadScore<Real> score(p, batch, head);
      const Rows<T> query(p.query, batch, head, p.query_length, p.head_dim);
      const Rows<T> key(p.key, batch, head / p.group_size(), p.key_length, p.head_dim);
      for (int64_t row = block.rows.begin; row < block.rows.end; row += kTile) {
        const int64_t row_end = row + kTile < p.query_length ? row + kTile : p.query_length;
        const SelectionRows<Real> rows(p, t, statistics, score.batch_head, row);
        const KeyRange attended = score.band.keys_of_any(row, row_end);
        for (int64_t first = block.keys.begin; first < block.keys.end; first += kTile) {
          if (first >= attended.end || first + kTile <= attended.begin) continue;
          Real dot[kPerThread][kPerThread] = {};
          multiply_transposed(dot, shared, query, row, key, first);
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            const int64_t r = row + thread_y() * kPerThread + i;
            const SelectionRow<Real> stats = rows[thread_y() * kPerThread + i];
#pragma unroll
            for (int j = 0; j < kPerThread; ++j)
              sum[i][j] +=
                  stats.gradient(score.score(score.mod.capped(dot[i][j]), r, first + thread_x() + kSide * j, true));
            stats.for_chosen(first, [&](int place, Real gradient) {
#pragma unroll
              for (int j = 0; j < kPerThread; ++j)
                if (place == thread_x() + kSide * j) sum[i][j] += gradient;
            });
          }
        }
      }
    }
  }
  store_mask_gradient(block, t.grad_attn_mask, shared, sum);
}

template <class T, int kColumns>
void selection_query_gradient(const AttentionProblem& p, const SelectionBackwardTensors& t, void* workspace,
                              const Stream& stream) {
  const int64_t chunks = p.head_dim > 0 ? (p.head_dim + kColumns - 1) / kColumns : 1;
  const int64_t tiles = (p.query_length + kTile - 1) / kTile;
  launch(selection_query_gradient_kernel<T, kColumns>, p.batch * p.heads * tiles * chunks, kThreads,
         sizeof(Shared<Accumulator<T>, kColumns>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

template <class T, int kColumns>
void selection_key_gradient(const AttentionProblem& p, const SelectionBackwardTensors& t, void* workspace,
                            const Stream& stream) {
  const int64_t chunks = p.head_dim > 0 ? (p.head_dim + kColumns - 1) / kColumns : 1;
  const int64_t tiles = (p.key_length + kTile - 1) / kTile;
  launch(selection_key_gradient_kernel<T, kColumns>, p.batch * p.kv_heads * tiles * chunks, kThreads,
         sizeof(Shared<Accumulator<T>, kColumns>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

template <class T>
void selection_mask_gradient(const AttentionProblem& p, const SelectionBackwardTensors& t, void* workspace,
                             const Stream& stream) {
  launch(selection_mask_gradient_kernel<T>, mask_gradient_blocks(p, t.grad_attn_mask), kThreads,
         sizeof(Shared<Accumulator<T>, kTile>), stream, p, t, RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda::simt
