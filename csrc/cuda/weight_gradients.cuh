// How the gradients of statistics and of maps become gradients of scores; for the backward kernels of both tiers.
#pragma once

#include "map_rows.cuh"

namespace torch_attn::cuda {

// d loss / d P of one head, term by term (see MapBackwardTensors): for kCount keys of a row,
// keys.first + keys.offset(n).
template <class T>
struct WeightGradients {
  using Real = Accumulator<T>;

  const MapBackwardTensors& t;
  int64_t rows, keys, first_row;  // sizes, and the number of row 0 in (B, Hq, L)
  const Real* columns;            // column_sum's gradients; null: none
  const T* dense;                 // null: none
  Real dense_factor;

  TA_DEVICE WeightGradients(const AttentionProblem& p, const MapBackwardTensors& tensors, int64_t batch, int64_t head)
      : t(tensors),
        rows(p.query_length),
        keys(p.key_length),
        first_row((batch * p.heads + head) * p.query_length),
        columns(nullptr),
        dense(nullptr),
        dense_factor(static_cast<Real>(tensors.weights_factor)) {
    if (t.column_sum) columns = static_cast<const Real*>(t.column_sum) + (batch * p.heads + head) * p.key_length;
    if (t.weights.defined())
      dense = static_cast<const T*>(t.weights.data) + batch * t.weights.stride[0] + head * t.weights.stride[1];
  }

  // Sets `gradient` to the terms whose sums over the row the caller knows.
  template <int kCount, class Keys>
  TA_DEVICE void known(Real (&gradient)[kCount], const MapScore<Real>& score, const BackwardRow<Real>& stats,
                       int64_t row, const Keys& at, const Real (&scores)[kCount]) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) gradient[n] = 0;
    if (row >= rows) return;
    const int64_t place = first_row + row;
    if (t.entropy || t.mean_distance || t.window_mass) {
      const auto number = [&](const void* of_rows) {
        return of_rows ? static_cast<const Real*>(of_rows)[place] : Real(0);
      };
      const RowGradients<Math<Real>> gradients{number(t.entropy), number(t.mean_distance), number(t.window_mass)};
      const Real log_scale = stats.scale == 1 ? Real(0) : Math<Real>::log(stats.scale);
      const Real to_first = static_cast<Real>(at.first - score.band.position(row));
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        gradient[n] =
            gradients.at(scores[n] - stats.logsumexp + log_scale,
                         Math<Real>::abs(to_first + static_cast<Real>(at.offset(n))), static_cast<Real>(t.mass_window));
    }
    for (int64_t c = 0; c < t.chosen; ++c) {
      const int64_t key = t.chosen_keys[place * t.chosen + c];
      const int64_t chosen = key < 0 ? -1 : key - at.first;
      const Real weight = static_cast<const Real*>(t.chosen_weights)[place * t.chosen + c];
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        if (chosen == at.offset(n)) gradient[n] += weight;
    }
  }

  // Adds the others to it.
  template <int kCount, class Keys>
  TA_DEVICE void add_unknown(Real (&gradient)[kCount], int64_t row, const Keys& at) const {
    if (row >= rows) return;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int64_t k = at.first + at.offset(n);
      if (k >= keys) continue;
      if (columns) gradient[n] += columns[k];
      if (dense) gradient[n] += load(dense + row * t.weights.stride[2] + k) * dense_factor;
    }
  }

  // d loss / d score, from the scores.
  template <int kCount, class Keys>
  TA_DEVICE void of_scores(Real (&gradient)[kCount], const MapScore<Real>& score, const BackwardRow<Real>& stats,
                           int64_t row, const Keys& at, const Real (&scores)[kCount]) const {
    known(gradient, score, stats, row, at, scores);
    if (columns || dense) add_unknown(gradient, row, at);
#pragma unroll
    for (int n = 0; n < kCount; ++n) gradient[n] = stats.weight(scores[n]) * (gradient[n] - stats.delta);
  }
};

}  // namespace torch_attn::cuda
