// grad_key and grad_value on tensor cores: one block per 64 keys of a key/value head and kColumns columns of the
// gradients. The query rows of all query heads that read the head stream through two buffers. Tiles are transposed,
// rows are keys.
#pragma once

#include "query_gradient.cuh"

namespace torch_attn::cuda::sm80 {

// Both gradients' accumulators take kColumns of a thread's 255 registers.
template <int kDim>
inline constexpr int kGradientColumns = kDim <= 128 ? kDim : 128;

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kThreads)
    key_value_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                              const RowStatistics<float> statistics) {
  using Shape = BackwardShape<kDim>;
  constexpr int kGroups = Shape::kStep / 8, kColumns = kGradientColumns<kDim>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<BackwardShared<T, kDim>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, Shape::kRows);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % (kDim / kColumns)) * kColumns;
  index /= kDim / kColumns;
  const int64_t first = index % tiles * Shape::kRows;
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  const int lane = lane_index(), warp_row = 16 * warp_index();

  const Rows<T> key(p.key, batch, kv_head, p.key_length, p.head_dim);
  const Rows<T> value(p.value, batch, kv_head, p.key_length, p.value_dim);

  // The steps: all rows that may attend these keys (the same rows in every head), head by head.
  int64_t head = kv_head * p.group_size();
  const int64_t head_end = head + p.group_size();
  const RowRange range = HeadScore<float>(p, batch, head).rows_of_any(first, first + Shape::kRows);
  const int64_t begin = range.begin / Shape::kStep * Shape::kStep;
  int64_t row = begin;
  if (row >= range.end) head = head_end;
  const bool any_step = head < head_end;
  const auto copy_step = [&](auto& pair, int64_t step_head, int64_t step_row) {
    copy_tile(pair.dots, Rows<T>(p.query, batch, step_head, p.query_length, p.head_dim), step_row);
    copy_tile(pair.grads, Rows<T>(t.grad_out, batch, step_head, p.query_length, p.value_dim), step_row);
  };
  copy_tile(shared.dots, key, first);
  copy_tile(shared.grads, value, first);
  if (any_step) copy_step(shared.step[0], head, row);
  ptx::cp_async_commit();

  float grad_key[1][kColumns / 8][4] = {}, grad_value[1][kColumns / 8][4] = {};
  for (int buffer = 0; head < head_end; buffer ^= 1) {
    const int64_t row_end = row + Shape::kStep < p.query_length ? row + Shape::kStep : p.query_length;
    const HeadScore<float> score(p, batch, head);
    const float factor = score.mod.scale * kLog2E;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles have landed, and the last step's are read no more
    const bool next_head = row + Shape::kStep >= range.end;
    const int64_t following_head = head + next_head, following_row = next_head ? begin : row + Shape::kStep;
    if (following_head < head_end) copy_step(shared.step[buffer ^ 1], following_head, following_row);
    ptx::cp_async_commit();

    auto& pair = shared.step[buffer];
    float x[1][kGroups][4] = {}, grad[1][kGroups][4] = {};
    multiply_transposed<1>(x, shared.dots, warp_row, pair.dots);
    multiply_transposed<1>(grad, shared.grads, warp_row, pair.grads);
    const bool tested = !score.unmasked(row, row_end, first, first + Shape::kRows);
    const BackwardRows<float> rows(p, t, statistics, score.batch_head, row);
    TileRange attended[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      attended[half] = tested ? TileRange::rows_of_key(score, first + warp_row + 8 * half + lane / 4, row, Shape::kStep)
                              : TileRange{0, Shape::kStep};
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      uint32_t kept = ~0u;
      if (kFull && score.dropout_on) kept = kept_of_key_rows(score, first + warp_row, row + 8 * n);
      float weight[4];  // [half: key][e: query row]
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t r = row + 8 * n + 2 * (lane % 4) + e;
        const BackwardRow<float> stats = rows[8 * n + 2 * (lane % 4) + e];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = warp_row + 8 * half + lane / 4, i = 2 * half + e;
          const bool is_attended = attended[half].contains(8 * n + 2 * (lane % 4) + e);
          float& gradient = grad[0][n][i];
          if (kFull) {
            const float capped = score.mod.capped(x[0][n][i]);
            weight[i] = stats.weight(full_score(score, capped, r, first + k, is_attended));
            gradient = weight[i] * (score.dropped(gradient, kept >> i & 1) - stats.delta) *
                       score.mod.capped_derivative(capped);
            if (!(kept >> i & 1)) weight[i] = 0;
          } else {
            weight[i] = is_attended ? stats.plain_weight(x[0][n][i], factor) : 0.0f;
            gradient = weight[i] * (gradient - stats.delta);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[0][n][i] = weight[i];
    }
    if (t.grad_value.defined()) multiply<1, kColumns>(grad_value, x, pair.grads, column);
    if (t.grad_key.defined()) multiply<1, kColumns>(grad_key, grad, pair.dots, column);
    head = following_head;
    row = following_row;
  }

  if (!any_step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  const float key_scale = kFull ? 1.0f : static_cast<float>(p.scale), key_factors[1][2] = {{key_scale, key_scale}};
  const float keep_scale = kFull && p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
  const float value_factors[1][2] = {{keep_scale, keep_scale}};
  if (t.grad_key.defined())
    store_rows<1, kColumns>(Rows<T>(t.grad_key, batch, kv_head, p.key_length, p.head_dim), first + warp_row, column,
                            grad_key, key_factors, shared.dots, warp_row);
  if (t.grad_value.defined())
    store_rows<1, kColumns>(Rows<T>(t.grad_value, batch, kv_head, p.key_length, p.value_dim), first + warp_row, column,
                            grad_value, value_factors, shared.grads, warp_row);
}

template <class T, int kDim, bool kFull>
void key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  const int64_t tiles = (p.key_length + BackwardShape<kDim>::kRows - 1) / BackwardShape<kDim>::kRows;
  launch(key_value_gradient_kernel<T, kDim, kFull>, p.batch * p.kv_heads * tiles * (kDim / kGradientColumns<kDim>),
         kThreads, sizeof(BackwardShared<T, kDim>), stream, p, t, RowStatistics<float>(p, workspace));
}

}  // namespace torch_attn::cuda::sm80
