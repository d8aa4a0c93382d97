// What the kernels of attention maps of both tiers have in common: a head's scores, of chosen rows, too, what is known
// of its rows, and the kernels that find it out.
#pragma once

#include "../core/map_statistics.h"
#include "map_kernels.h"
#include "row_statistics.cuh"

namespace torch_attn::cuda {

// HeadScore for calls whose rows may be a selection of a longer query's (AttentionProblem::query_rows), in any order.
template <class Real>
struct MapScore : HeadScore<Real> {
  TA_DEVICE MapScore(const AttentionProblem& p, int64_t batch, int64_t head) : HeadScore<Real>(p, batch, head) {
    if (p.query_rows == nullptr) return;
    const int64_t key_length = this->band.key_length;
    this->band = band_mask_of_selected_rows(p, batch);
    this->band.key_length = key_length;
  }
  TA_DEVICE bool selected() const { return this->band.rows != nullptr; }
  TA_DEVICE bool unmasked(int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) const {
    return !selected() && HeadScore<Real>::unmasked(row_begin, row_end, key_begin, key_end);
  }
  TA_DEVICE RowRange rows_of_any(int64_t key_begin, int64_t key_end) const {
    return selected() ? RowRange{0, this->query_length} : HeadScore<Real>::rows_of_any(key_begin, key_end);
  }
  TA_DEVICE Real distance(int64_t row, int64_t key) const {
    return Math<Real>::abs(static_cast<Real>(key - this->band.position(row)));
  }
};

// A head's rows from `row` on, as forward knows them: no row has a delta.
template <class Real>
struct WeightRows {
  const Real *logsumexp, *weight_scale;
  int64_t left;

  TA_DEVICE WeightRows(const AttentionProblem& p, const void* all_logsumexp, const Real* all_scales, int64_t batch_head,
                       int64_t row)
      : logsumexp(static_cast<const Real*>(all_logsumexp) + batch_head * p.query_length + row),
        weight_scale(all_scales + batch_head * p.query_length + row),
        left(p.query_length - row) {}
  TA_DEVICE BackwardRow<Real> operator[](int i) const {
    if (i >= left) return {};
    return {OnlineSoftmax<Math<Real>>::safe_maximum(logsumexp[i]), weight_scale[i], 0};
  }
};

// Writes what is wanted of one row, `place` in (B, Hq, L), from its highest score and that key; argmax below 0: no key.
// weight_scale: what its weights, recomputed from logsumexp, are to be multiplied by, see kLargeLogsumexp.
template <class Real, class M>
TA_DEVICE void write_statistics(const StatisticsOutputs& out, Real* weight_scale, int64_t place,
                                const torch_attn::RowStatistics<M>& of_row, Real highest, int64_t argmax) {
  const auto write = [&](void* to, Real x) {
    if (to) static_cast<Real*>(to)[place] = x;
  };
  write(out.logsumexp, of_row.logsumexp);
  write(out.entropy, of_row.entropy);
  write(out.max_weight, of_row.factor);
  write(out.mean_distance, of_row.mean_distance);
  write(out.window_mass, of_row.window_mass);
  if (out.argmax) out.argmax[place] = argmax;
  // The highest weight over what logsumexp says it is.
  const Real told = Math<Real>::exp(highest - of_row.logsumexp);
  const bool large = Math<Real>::abs(of_row.logsumexp) > static_cast<Real>(kLargeLogsumexp);
  weight_scale[place] = large && told > 0 ? of_row.factor / told : Real(1);
}

// The rows' weight_scale; a warp for each row.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    weight_scale_kernel(const __grid_constant__ AttentionProblem p, const Accumulator<T>* logsumexp,
                        Accumulator<T>* weight_scale) {
  const int64_t index = int64_t{blockIdx.x} * (kStatisticsThreads / 32) + threadIdx.x / 32;  // of (B, Hq, L)
  if (index >= p.batch * p.heads * p.query_length) return;
  const int64_t head = index / p.query_length % p.heads, batch = index / p.query_length / p.heads;
  const MapScore<Accumulator<T>> score(p, batch, head);
  const Accumulator<T> scale = weight_scale_of_row<T>(p, score, batch, head, index % p.query_length, logsumexp[index]);
  if (threadIdx.x % 32 == 0) weight_scale[index] = scale;
}

// What row_statistics.cuh keeps of each row: delta as far as the caller knows it. A warp for each row.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    map_row_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ MapBackwardTensors t,
                   const RowStatistics<Accumulator<T>> statistics) {
  using Real = Accumulator<T>;
  const int64_t index = int64_t{blockIdx.x} * (kStatisticsThreads / 32) + threadIdx.x / 32;  // of (B, Hq, L)
  if (index >= p.batch * p.heads * p.query_length) return;
  const int64_t head = index / p.query_length % p.heads, batch = index / p.query_length / p.heads;
  const MapScore<Real> score(p, batch, head);
  const Real scale = weight_scale_of_row<T>(p, score, batch, head, index % p.query_length,
                                            static_cast<const Real*>(t.logsumexp)[index]);
  if (threadIdx.x % 32 != 0) return;
  statistics.delta[index] = t.grad_logsumexp ? -static_cast<const Real*>(t.grad_logsumexp)[index] : Real(0);
  statistics.weight_scale[index] = scale;
}

inline int64_t blocks_of_rows(const AttentionProblem& p) {
  constexpr int64_t kRowsPerBlock = kStatisticsThreads / 32;
  return (p.batch * p.heads * p.query_length + kRowsPerBlock - 1) / kRowsPerBlock;
}

template <class T>
void map_weight_scales(const AttentionProblem& p, const void* logsumexp, void* workspace, const Stream& stream) {
  using Real = Accumulator<T>;
  launch<AttentionProblem, const Real*, Real*>(weight_scale_kernel<T>, blocks_of_rows(p), kStatisticsThreads, 0, stream,
                                               p, static_cast<const Real*>(logsumexp), static_cast<Real*>(workspace));
}

template <class T>
void map_row_statistics(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace, const Stream& stream) {
  launch(map_row_kernel<T>, blocks_of_rows(p), kStatisticsThreads, 0, stream, p, t,
         RowStatistics<Accumulator<T>>(p, workspace));
}

}  // namespace torch_attn::cuda
