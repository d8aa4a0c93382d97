// What the kernels with a block for each part of the keys share (key_value_gradient.cuh, all_gradients.cuh): the order
// in which they go through the query rows, and what they do to a tile of scores. Tiles are transposed, rows are keys.
#pragma once

#include "../row_statistics.cuh"
#include "lane_scores.cuh"

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
// dropout, without its scale; grad holds grad_out·value and becomes the gradient of the capped scores: of q·k, in a
// plain kernel without the scale. `tested`: whether some of these rows and keys do not exist or attend one another.
template <bool kFull, int kGroups>
TA_DEVICE void weights_and_gradients(float (&x)[1][kGroups][4], float (&grad)[1][kGroups][4],
                                     const HeadScore<float>& score, const BackwardRows<float>& rows, int64_t key,
                                     int64_t row, bool tested) {
  constexpr int kCount = 2 * kGroups;
  const int64_t lane_key = key + lane_index() / 4;
  if constexpr (!kFull) {
    const float factor = score.mod.scale * kLog2E;
    if (tested) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const TileRange attending = TileRange::rows_of_key(score, lane_key + 8 * half, row, 8 * kGroups);
        set_unattended(x[0], half, attending, -INFINITY);
        set_unattended(grad[0], half, attending, 0);  // whatever values, NaN even, were met there
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const BackwardRow<float> stats = rows[column_of_lane(i)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& weight = x[0][i / 2][2 * half + i % 2];
        float& gradient = grad[0][i / 2][2 * half + i % 2];
        weight = stats.plain_weight(weight, factor);
        gradient = weight * (gradient - stats.delta);
      }
    }
  } else {
    static_assert(kGroups % 4 == 0 && kGroups <= 8);
    uint32_t kept = 0;
    if (score.dropout_on) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        if (n % 4 == 0) kept |= kept_of_key_rows(score, key, row + 8 * n) << n;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          grad[0][n][i] = is_kept_in_key_rows(kept, n, i) ? grad[0][n][i] * score.keep_scale : 0.0f;
      }
    }
    as_rows(x, [&](auto& scores) {
      cap_scores(scores, score.mod);
      finish_scores_of_keys(scores, score, lane_key, row, tested);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const BackwardRow<float> stats = rows[column_of_lane(i)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& gradient = grad[0][i / 2][2 * half + i % 2];
          scores[half][i] = stats.full_weight(scores[half][i]);
          gradient = scores[half][i] * (gradient - stats.delta);
        }
      }
    });
    if (score.dropout_on) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!is_kept_in_key_rows(kept, n, i)) x[0][n][i] = 0;
    }
  }
}

// What the accumulated gradients are multiplied by at the end.
template <bool kFull>
TA_HOST_DEVICE float score_factor(const AttentionProblem& p) {
  return kFull ? 1.0f : static_cast<float>(p.scale);
}
template <bool kFull>
TA_DEVICE float value_factor(const AttentionProblem& p) {
  return kFull && p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
}

}  // namespace torch_attn::cuda::sm80
