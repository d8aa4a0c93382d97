// What the backward kernels of every tier need to know of a query row, computed before they run, and the reduction that
// follows them. In the workspace: three arrays of the accumulator type, laid out as logsumexp is.
#pragma once

#include "head_score.cuh"
#include "launch.h"

namespace torch_attn::cuda {

template <class Real>
struct RowStatistics {
  Real* delta;         // grad_out · out − grad_logsumexp: what every weight's gradient is reduced by
  Real* weight_scale;  // 1, or for a large logsumexp 1 / sum of exp(score − logsumexp); see core/online_softmax.h
  Real* grad_slope;    // written by the query pass: each row's contribution to grad_alibi_slopes

  RowStatistics(const AttentionProblem& p, void* workspace)
      : delta(static_cast<Real*>(workspace)),
        weight_scale(delta + p.all_rows()),
        grad_slope(weight_scale + p.all_rows()) {}
};

// Eight lanes for each row: at 64 columns each reads 16 bytes of it. A warp for a row took 2 to 3 times as long on an
// H200.
constexpr int kStatisticsThreads = 256, kStatisticsLanes = 8;

template <class Real>
TA_DEVICE Real warp_sum(Real x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// See core/online_softmax.h.
template <class Real>
TA_DEVICE bool has_large_logsumexp(Real logsumexp) {
  const Real magnitude = Math<Real>::abs(logsumexp);
  return magnitude > static_cast<Real>(kLargeLogsumexp) && magnitude < static_cast<Real>(INFINITY);
}

// What a row's weights, recomputed from logsumexp, are to be multiplied by: see RowStatistics. A warp's work; Score is
// HeadScore or derived from it.
template <class T, class Score>
TA_DEVICE Accumulator<T> weight_scale_of_row(const AttentionProblem& p, const Score& score, int64_t batch, int64_t head,
                                             int64_t row, Accumulator<T> logsumexp) {
  using Real = Accumulator<T>;
  if (!has_large_logsumexp(logsumexp)) return 1;
  const auto row_of = [&](const TensorView& view, int64_t view_head, int64_t view_row) {
    return static_cast<const T*>(view.data) + batch * view.stride[0] + view_head * view.stride[1] +
           view_row * view.stride[2];
  };
  const T* const query = row_of(p.query, head, p.first_query(batch) + row);
  const int64_t first_key = p.first_key(batch);
  const KeyRange range = score.band.keys_of_row(row);
  Real sum = 0;
  for (int64_t key = range.begin + threadIdx.x % 32; key < range.end; key += 32) {
    const T* const k = row_of(p.key, head / p.group_size(), first_key + key);
    Real dot = 0;
    for (int64_t c = 0; c < p.head_dim; ++c) dot += load(query + c) * load(k + c);
    sum += Math<Real>::exp(score.score(score.mod.capped(dot), row, key, true) - logsumexp);
  }
  sum = warp_sum(sum);
  if (p.sinks.defined()) sum += Math<Real>::exp(per_head<Real>(p.sinks, batch, head) - logsumexp);
  return sum > 0 ? 1 / sum : Real(1);
}

// out · grad_out of one row, by kStatisticsLanes lanes.
template <class T>
TA_DEVICE Accumulator<T> row_product(const T* x, const T* y, int64_t columns, bool in_pieces) {
  constexpr int kPieceSize = 16 / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % kStatisticsLanes;
  Accumulator<T> sum = 0;
  if (in_pieces) {
    struct alignas(16) Piece {
      T element[kPieceSize];
    };
#pragma unroll 2
    for (int64_t c = lane * kPieceSize; c < columns; c += kStatisticsLanes * kPieceSize) {
      const Piece a = *reinterpret_cast<const Piece*>(x + c), b = *reinterpret_cast<const Piece*>(y + c);
#pragma unroll
      for (int i = 0; i < kPieceSize; ++i) sum += load(a.element + i) * load(b.element + i);
    }
  } else {
    for (int64_t c = lane; c < columns; c += kStatisticsLanes) sum += load(x + c) * load(y + c);
  }
#pragma unroll
  for (int step = kStatisticsLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// in_pieces: rows of out and grad_out can be read 16 bytes at a time.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    row_statistics_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                          const RowStatistics<Accumulator<T>> result, const bool in_pieces) {
  using Real = Accumulator<T>;
  struct Place {
    int64_t row, head, batch, index;  // index: in the arrays of all rows
    bool exists;
  };
  const auto place_of = [&](int64_t i) {  // of (B, Hq, L)
    Place place{i % p.query_length, i / p.query_length % p.heads, i / p.query_length / p.heads, 0, false};
    place.exists = place.batch < p.batch && place.row < p.queries_of(place.batch);
    if (place.exists) place.index = p.first_row(place.batch, place.head) + place.row;
    return place;
  };
  const int64_t first = (int64_t{blockIdx.x} * kStatisticsThreads + threadIdx.x / 32 * 32) / kStatisticsLanes;
  const Place own = place_of(first + threadIdx.x % 32 / kStatisticsLanes);
  const auto row_of = [&](const TensorView& view) {
    return static_cast<const T*>(view.data) + own.batch * view.stride[0] + own.head * view.stride[1] +
           (p.first_query(own.batch) + own.row) * view.stride[2];
  };
  Real delta = own.exists ? row_product(row_of(t.out), row_of(t.grad_out), p.value_dim, in_pieces)
                          : row_product<T>(nullptr, nullptr, 0, in_pieces);
  Real logsumexp = 0;
  if (own.exists) {
    logsumexp = static_cast<const Real*>(t.logsumexp)[own.index];
    if (t.grad_logsumexp) delta -= static_cast<const Real*>(t.grad_logsumexp)[own.index];
    if (threadIdx.x % kStatisticsLanes == 0) {
      result.delta[own.index] = delta;
      result.weight_scale[own.index] = 1;
    }
  }
  // The rare rows whose logsumexp is large are the whole warp's work, one after the other.
#pragma unroll 1
  for (int i = 0; i < 32 / kStatisticsLanes; ++i) {
    const Real of_row = __shfl_sync(~0u, logsumexp, i * kStatisticsLanes);
    if (!has_large_logsumexp(of_row)) continue;
    const Place place = place_of(first + i);
    const HeadScore<Real> score(p, place.batch, place.head);
    const Real scale = weight_scale_of_row<T>(p, score, place.batch, place.head, place.row, of_row);
    __syncwarp();  // the 1 that is replaced
    if (threadIdx.x % 32 == 0) result.weight_scale[place.index] = scale;
  }
}

template <class T>
void row_statistics(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  constexpr int64_t kPieceSize = 16 / sizeof(T), kRows = kStatisticsThreads / kStatisticsLanes;
  const auto is_in_pieces = [](const TensorView& view) {
    bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
    for (int dimension = 0; dimension < 3; ++dimension) aligned = aligned && view.stride[dimension] % kPieceSize == 0;
    return aligned;
  };
  const bool in_pieces = p.value_dim % kPieceSize == 0 && is_in_pieces(t.out) && is_in_pieces(t.grad_out);
  launch(row_statistics_kernel<T>, (p.batch * p.heads * p.query_length + kRows - 1) / kRows, kStatisticsThreads, 0,
         stream, p, t, RowStatistics<Accumulator<T>>(p, workspace), in_pieces);
}

// One query row, as the backward kernels recompute its weights.
template <class Real>
struct BackwardRow {
  Real logsumexp = static_cast<Real>(INFINITY), scale = 0, delta = 0;  // outside the query: all weights are 0

  TA_DEVICE Real weight(Real score) const { return Math<Real>::exp(score - logsumexp) * scale; }
  // The same with the tensor cores' tier's exponential.
  TA_DEVICE Real full_weight(Real score) const { return ptx::ex2_approx((score - logsumexp) * kLog2E) * scale; }
  // The same from q·k, for a score that is only scaled: factor is scale · log2(e). Half a 16-bit unit at most.
  TA_DEVICE Real plain_weight(Real dot, Real factor) const {
    return ptx::ex2_approx(dot * factor - logsumexp * kLog2E) * scale;
  }
};

// A head's rows from `row` on.
template <class Real>
struct BackwardRows {
  const Real *logsumexp, *weight_scale, *delta;
  int left;

  TA_DEVICE BackwardRows(const AttentionProblem& p, const BackwardTensors& t, const RowStatistics<Real>& statistics,
                         int64_t batch_head, int64_t row)
      : BackwardRows(t, statistics, batch_head * p.query_length + row, p.query_length - row) {}
  TA_DEVICE BackwardRows(const HeadScore<Real>& score, const BackwardTensors& t, const RowStatistics<Real>& statistics,
                         int64_t row)
      : BackwardRows(t, statistics, score.first_row + row, score.query_length - row) {}
  TA_DEVICE BackwardRow<Real> operator[](int i) const {
    if (i >= left) return {};
    return {OnlineSoftmax<Math<Real>>::safe_maximum(logsumexp[i]), weight_scale[i], delta[i]};
  }

 private:
  TA_DEVICE BackwardRows(const BackwardTensors& t, const RowStatistics<Real>& statistics, int64_t first, int64_t rows)
      : logsumexp(static_cast<const Real*>(t.logsumexp) + first),
        weight_scale(statistics.weight_scale + first),
        delta(statistics.delta + first),
        left(rows < 1 << 30 ? static_cast<int>(rows) : 1 << 30) {}
};

// grad_alibi_slopes (B, Hq): a block sums one head's rows, always in the same order.
template <class Real>
__global__ void __launch_bounds__(32)
    sum_slopes_kernel(const __grid_constant__ AttentionProblem p, const Real* grad_slope, Real* result) {
  const int64_t batch = blockIdx.x / p.heads, rows = p.queries_of(batch);
  const int64_t first = p.first_row(batch, blockIdx.x % p.heads);
  Real sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += 32) sum += grad_slope[first + row];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) result[blockIdx.x] = sum;
}

template <class T>
void slope_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  using Real = Accumulator<T>;
  launch<AttentionProblem, const Real*, Real*>(sum_slopes_kernel<Real>, p.batch * p.heads, 32, 0, stream, p,
                                               RowStatistics<Real>(p, workspace).grad_slope,
                                               static_cast<Real*>(t.grad_alibi_slopes));
}

}  // namespace torch_attn::cuda
