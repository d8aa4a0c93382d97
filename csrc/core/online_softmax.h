// The running maximum and sum of a softmax over streamed keys (Milakov & Gimelshein 2018; Dao et al. 2022, alg. 1), and
// the library's conventions for its ends: an empty row, a sink, and the logsumexp a row reports. Used by every kernel.
#pragma once

#include "macros.h"

namespace torch_attn {

// Value is a scalar or a vector of lanes; Math gives max, exp, log, select and the constants (see score_mod.h).
template <class Math>
struct OnlineSoftmax {
  using Value = typename Math::Value;

  // A row of only −inf keeps −inf as maximum; subtracting 0 instead gives exp(−inf) = 0, never NaN.
  TA_HOST_DEVICE static Value safe_maximum(Value maximum) {
    return Math::select_equal(maximum, Math::negative_infinity(), Math::splat(0), maximum);
  }
  // What the sum and the output gathered so far are multiplied by when the maximum moves up. 1 where nothing changed,
  // so that an infinite maximum does not become NaN.
  TA_HOST_DEVICE static Value rescale(Value old_maximum, Value new_maximum) {
    return Math::select_equal(old_maximum, new_maximum, Math::splat(1), Math::exp(old_maximum - new_maximum));
  }
  // An empty row (sum 0) has output 0 and logsumexp −inf.
  TA_HOST_DEVICE static Value inverse_sum(Value sum) {
    return Math::select_equal(sum, Math::splat(0), Math::splat(0), Math::splat(1) / sum);
  }
  TA_HOST_DEVICE static Value logsumexp(Value maximum, Value sum) {
    return Math::select_equal(sum, Math::splat(0), Math::negative_infinity(), maximum + Math::log(sum));
  }
};

// In backward, a weight is recomputed as exp(score − logsumexp). Rounding of a large logsumexp (a row whose every key
// carries a bias such as −1e9 or the dtype's minimum) would scale the whole row: beyond this bound kernels sum
// exp(score − logsumexp) over the row again and divide by it. float32 logsumexp up to here errs by at most 1.3e-4.
constexpr double kLargeLogsumexp = 4096.0;

}  // namespace torch_attn
