// What the kernels of attention maps read beside the AttentionProblem, and write; filled by the ops/ files that call
// them.
#pragma once

#include "problem.h"

namespace torch_attn {

// What the kernel of attention_statistics writes; a null one is not wanted. All are contiguous, of (B, Hq, L), numbers
// of accumulator type.
struct StatisticsOutputs {
  void* logsumexp = nullptr;
  void* entropy = nullptr;
  void* max_weight = nullptr;
  int64_t* argmax = nullptr;
  void* mean_distance = nullptr;
  void* window_mass = nullptr;
  void* top_weights = nullptr;  // (B, Hq, L, top_k)
  int64_t* top_indices = nullptr;
  void* column_sum = nullptr;  // (B, Hq, S)
  int64_t mass_window = 0;
  int64_t top_k = 0;
};

// What the kernel of attention_weights reads beside the problem, and writes.
struct WeightsOutputs {
  const void* logsumexp = nullptr;  // (B, Hq, L), contiguous, accumulator type
  TensorView weights;               // (B, Hq, L, S) or, for the mean over heads, (B, 1, L, S); column stride 1
  bool mean = false;
};

// The same for kernels that can find logsumexp on the way: where it is null, computed_logsumexp and out are written.
struct SoftmaxOutputs : WeightsOutputs {
  void* computed_logsumexp = nullptr;  // null: not wanted
  TensorView out;                      // attention's output, column stride 1; undefined: not wanted
};

// Backward of both: from d loss / d P, which is the sum of the terms below, to the inputs' gradients. Null or undefined
// terms are 0. Of BackwardTensors, logsumexp is read, and grad_logsumexp holds for each row
//   d loss / d logsumexp − Σ P · (d loss / d P)
// as far as the caller knows the sum: for column_sum and weights the kernel subtracts it, in place. There is no value:
// value_dim is 0, out and grad_out are undefined.
struct MapBackwardTensors : BackwardTensors {
  void* row_terms = nullptr;  // grad_logsumexp, to be written

  // d loss / d statistic, (B, Hq, L), contiguous, accumulator type; see core/map_statistics.h.
  const void* entropy = nullptr;
  const void* mean_distance = nullptr;
  const void* window_mass = nullptr;
  int64_t mass_window = 0;
  const void* column_sum = nullptr;  // the same, (B, Hq, S)

  // d loss / d P of chosen keys, (B, Hq, L, chosen); keys below 0 are skipped.
  int64_t chosen = 0;
  const int64_t* chosen_keys = nullptr;
  const void* chosen_weights = nullptr;

  // d loss / d P, any floating dtype, column stride 1, to be multiplied by weights_factor; stride 0 over heads where
  // these share it.
  TensorView weights;
  double weights_factor = 1;
};

}  // namespace torch_attn
