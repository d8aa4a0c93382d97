// What the kernels of attention maps have in common: a head's scores, of chosen rows, too, and its rows' logsumexp.
// Included by map_*.cuh.
#pragma once

#include "../../core/map_statistics.h"
#include "../row_statistics.cuh"
#include "map_variants.h"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

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

// The tiles of 64 rows and of 64 keys; at least one chunk of columns.
inline int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }
inline int64_t chunks_of(int64_t columns) { return columns > kTile ? tiles_of(columns) : 1; }

template <class Real>
using MapShared = Shared<Real, kTile>;

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

}  // namespace torch_attn::cuda::simt
