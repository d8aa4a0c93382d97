// The statistics of a row's attention weights, gathered while its keys stream by, and the gradients that lead back to
// the weights. Shared by the kernels of attention_statistics through the policy Math (see score_mod.h), which here also
// gives select_less.
//
// With m the highest score so far and p = exp(score − m), a row keeps the sums of p, p·(score − m), p·distance and p
// inside a window; when m rises they are rescaled. The weights are P = p · factor in the end, and their entropy
//   −Σ P·log P = Σ P · (logsumexp − m) − factor · Σ p·(score − m),
// two terms of the same sign, so that nothing cancels.
#pragma once

#include "online_softmax.h"

namespace torch_attn {

template <class Math>
struct RowSums {
  using Value = typename Math::Value;

  Value sum, score_sum, distance_sum, window_sum;

  TA_HOST_DEVICE static RowSums zero() {
    const Value nothing = Math::splat(0);
    return {nothing, nothing, nothing, nothing};
  }
  TA_HOST_DEVICE void add(Value score_minus_maximum, Value distance, Value window) {
    const Value weight = Math::exp(score_minus_maximum), nothing = Math::splat(0);
    sum += weight;
    score_sum += Math::select_equal(weight, nothing, nothing, weight * score_minus_maximum);  // the score may be −inf
    distance_sum += weight * distance;
    window_sum += Math::select_less(window, distance, nothing, weight);
  }
  TA_HOST_DEVICE void rescale(Value old_maximum, Value new_maximum) {
    const Value factor = OnlineSoftmax<Math>::rescale(old_maximum, new_maximum), nothing = Math::splat(0);
    score_sum = Math::select_equal(sum, nothing, nothing, (score_sum + (old_maximum - new_maximum) * sum) * factor);
    sum *= factor;
    distance_sum *= factor;
    window_sum *= factor;
  }
  // Adds what was gathered elsewhere with the same maximum.
  TA_HOST_DEVICE void merge(const RowSums& other) {
    sum += other.sum;
    score_sum += other.score_sum;
    distance_sum += other.distance_sum;
    window_sum += other.window_sum;
  }
};

template <class Math>
struct RowStatistics {
  using Value = typename Math::Value;

  Value logsumexp, entropy, mean_distance, window_mass;
  Value factor;  // from exp(score − maximum) to the weight: the highest score's weight

  // sink is −inf where there is none. A row without keys has weights of 0.
  TA_HOST_DEVICE static RowStatistics of(Value maximum, const RowSums<Math>& sums, Value sink) {
    const Value nothing = Math::splat(0), none = Math::negative_infinity();
    const Value highest = Math::select_less(maximum, sink, sink, maximum);
    const Value share = OnlineSoftmax<Math>::rescale(maximum, highest);
    const Value sink_weight = Math::select_equal(sink, none, nothing, Math::exp(sink - highest));
    const Value total = Math::select_equal(sums.sum, nothing, nothing, sums.sum * share) + sink_weight;

    RowStatistics r;
    r.logsumexp = OnlineSoftmax<Math>::logsumexp(highest, total);
    r.factor = Math::select_equal(sums.sum, nothing, nothing, share * OnlineSoftmax<Math>::inverse_sum(total));
    const Value above_maximum = highest - maximum + Math::log(total);  // logsumexp − maximum
    r.entropy = Math::select_equal(sums.sum, nothing, nothing, (sums.sum * above_maximum - sums.score_sum) * r.factor);
    r.mean_distance = sums.distance_sum * r.factor;
    r.window_mass = sums.window_sum * r.factor;
    return r;
  }
};

// d loss / d P of the statistics that are smooth in the score and the distance, for one row.
template <class Math>
struct RowGradients {
  using Value = typename Math::Value;

  Value entropy, mean_distance, window_mass;  // d loss / d statistic

  // window is mass_window; log_weight may be −inf, where the weight, 0, will multiply the result.
  TA_HOST_DEVICE Value at(Value log_weight, Value distance, Value window) const {
    const Value lowest = Math::splat(-1e4f), nothing = Math::splat(0);
    const Value finite = Math::select_less(log_weight, lowest, lowest, log_weight);
    return mean_distance * distance - entropy * (finite + Math::splat(1)) +
           Math::select_less(window, distance, nothing, window_mass);
  }
};

}  // namespace torch_attn
