// What the kernels with a block for each part of the keys share (key_value_gradient.cuh, all_gradients.cuh): the order
// in which they go through the query rows, and what they do to a tile of scores. Tiles are transposed, rows are keys.
#pragma once

#include "../row_statistics.cuh"
#include "score_tile.cuh"

namespace torch_attn::cuda::sm80 {

// The steps of kStep query rows that a block of keys [first, first + keys) takes: all rows that may attend these keys
// (the same rows in every head), head by head.
template <int kStep>
struct RowSteps {
  int head, row;  // of this step; no head has more rows than an int counts, for they would fill a GPU's memory
  int head_end, begin, end;

  TA_DEVICE RowSteps(const AttentionProblem& p, int64_t batch, int64_t kv_head, int64_t first, int keys)
      : RowSteps(p, kv_head, HeadScore<float>(p, batch, kv_head * p.group_size()).rows_of_any(first, first + keys)) {}
  TA_DEVICE RowSteps(const AttentionProblem& p, int64_t kv_head, const RowRange& range)
      : head(static_cast<int>(kv_head * p.group_size())), head_end(head + static_cast<int>(p.group_size())) {
    begin = row = static_cast<int>(range.begin) / kStep * kStep;
    end = static_cast<int>(range.end);
    if (row >= end) head = head_end;
  }
  TA_DEVICE bool done() const { return head >= head_end; }
  TA_DEVICE void advance() {
    row += kStep;
    if (row < end) return;
    row = begin;
    ++head;
  }
};

// One warp's 16 keys from `key` on, by 8 · kGroups query rows from `row` on. x holds q·k and becomes the weights after
// dropout, without its scale; grad holds grad_out·value and becomes the gradient of q·k, in a plain kernel without the
// scale.
template <bool kFull, int kGroups>
TA_DEVICE void weights_and_gradients(float (&x)[1][kGroups][4], float (&grad)[1][kGroups][4],
                                     const HeadScore<float>& score, const BackwardRows<float>& rows, int64_t key,
                                     int64_t row, bool tested) {
  constexpr int kRows = 8 * kGroups;
  const int lane = lane_index();
  const float factor = score.mod.scale * kLog2E;
  TileRange attended[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    attended[half] =
        tested ? TileRange::rows_of_key(score, key + 8 * half + lane / 4, row, kRows) : TileRange{0, kRows};
  uint32_t kept = ~0u;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    if (kFull && score.dropout_on && n % 2 == 0) kept = kept_of_key_rows(score, key, row + 8 * n);
    float weight[4];  // [half: key][e: query row]
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = 8 * n + 2 * (lane % 4) + e;
      const BackwardRow<float> stats = rows[r];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t k = key + 8 * half + lane / 4;
        const int i = 2 * half + e;
        const bool is_attended = attended[half].contains(r);
        float& gradient = grad[0][n][i];
        if (kFull) {
          const float capped = score.mod.capped(x[0][n][i]);
          weight[i] = stats.weight(full_score(score, capped, row + r, k, is_attended));
          gradient = weight[i] * (score.dropped(gradient, is_kept(kept, n, i)) - stats.delta) *
                     score.mod.capped_derivative(capped);
          if (!is_kept(kept, n, i)) weight[i] = 0;
        } else {
          weight[i] = is_attended ? stats.plain_weight(x[0][n][i], factor) : 0.0f;
          gradient = weight[i] * (gradient - stats.delta);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][n][i] = weight[i];
  }
}

// What the accumulated gradients are multiplied by at the end.
template <bool kFull>
TA_DEVICE float score_factor(const AttentionProblem& p) {
  return kFull ? 1.0f : static_cast<float>(p.scale);
}
template <bool kFull>
TA_DEVICE float value_factor(const AttentionProblem& p) {
  return kFull && p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
}

}  // namespace torch_attn::cuda::sm80
