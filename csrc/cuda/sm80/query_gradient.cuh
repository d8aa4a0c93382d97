// grad_query on tensor cores, and each row's part of grad_alibi_slopes: one block per 64 query rows. Keys and values
// stream through two buffers. The backward pass has this kernel and key_value_gradient.cuh, which both recompute the
// scores: seven products in place of five, and in exchange no atomics, so that gradients are the same in every run.
#pragma once

#include "../row_statistics.cuh"
#include "score_tile.cuh"

namespace torch_attn::cuda::sm80 {

// kStep: keys of a step here, query rows of a step in key_value_gradient.cuh.
template <class T, int kDim>
struct BackwardShape {
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kStep = kDim * sizeof(T) <= 128 ? 64 : 32;
};

// What a block keeps (two tiles of kRows) and what it streams (two pairs of tiles of kStep).
template <class T, int kDim>
struct BackwardShared {
  using Shape = BackwardShape<T, kDim>;
  struct Pair {
    Tile<T, Shape::kStep, kDim> dots, grads;  // the operands of q·k and of grad_out · value
  };
  Tile<T, Shape::kRows, kDim> dots, grads;
  Pair step[2];
};

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kThreads)
    query_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                          const RowStatistics<float> statistics) {
  using Shape = BackwardShape<T, kDim>;
  constexpr int kGroups = Shape::kStep / 8;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<BackwardShared<T, kDim>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, Shape::kRows);
  int64_t index = blockIdx.x;
  const int64_t row = (tiles - 1 - index % tiles) * Shape::kRows;
  index /= tiles;
  // Of 32 bits, and lengths and starts are asked for where they are needed: registers are short here.
  const int head = static_cast<int>(index % p.heads), batch = static_cast<int>(index / p.heads);
  const int queries = static_cast<int>(p.queries_of(batch));
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int64_t row_end = row + Shape::kRows < queries ? row + Shape::kRows : queries;
  const int lane = lane_index(), warp_row = 16 * warp_index();

  const HeadScore<float> score(p, batch, head);
  const int64_t kv_head = head / p.group_size();
  const Rows<T> query(p.query, batch, head, queries, p.head_dim, p.first_query(batch));
  const Rows<T> grad_out(t.grad_out, batch, head, queries, p.value_dim, p.first_query(batch));
  const Rows<T> key(p.key, batch, kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch));
  const Rows<T> value(p.value, batch, kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch));

  const KeyRange range = score.band.keys_of_any(row, row_end);
  const int64_t begin = range.begin / Shape::kStep * Shape::kStep;
  const int steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, Shape::kStep));
  copy_tile(shared.dots, query, row);
  copy_tile(shared.grads, grad_out, row);
  if (steps > 0) {
    copy_tile(shared.step[0].dots, key, begin);
    copy_tile(shared.step[0].grads, value, begin);
  }
  ptx::cp_async_commit();

  const BackwardRows<float> tile_rows(score, t, statistics, row);
  const BackwardRow<float> rows[2] = {tile_rows[warp_row + lane / 4], tile_rows[warp_row + lane / 4 + 8]};
  const float factor = score.mod.scale * kLog2E;
  float grad_slope[2] = {}, result[1][kDim / 8][4] = {};

  for (int step = 0; step < steps; ++step) {
    const int64_t first = begin + int64_t{step} * Shape::kStep;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles have landed, and the last step's are read no more
    if (step + 1 < steps) {
      copy_tile(shared.step[(step + 1) % 2].dots, key, first + Shape::kStep);
      copy_tile(shared.step[(step + 1) % 2].grads, value, first + Shape::kStep);
    }
    ptx::cp_async_commit();

    float x[1][kGroups][4] = {}, grad[1][kGroups][4] = {};
    multiply_transposed<1>(x, shared.dots, warp_row, shared.step[step % 2].dots);
    multiply_transposed<1>(grad, shared.grads, warp_row, shared.step[step % 2].grads);
    const bool tested = !score.unmasked(row, row_end, first, first + Shape::kStep);
    TileRange attended[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      attended[half] = tested ? TileRange::keys_of_row(score, row + warp_row + 8 * half + lane / 4, first, Shape::kStep)
                              : TileRange{0, Shape::kStep};
    uint32_t kept = ~0u;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (kFull && score.dropout_on && n % 2 == 0) kept = kept_of_query_rows(score, row + warp_row, first + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2, k = 8 * n + 2 * (lane % 4) + e % 2;
        const bool is_attended = attended[half].contains(k);
        float& element = x[0][n][e];
        if (kFull) {
          const int64_t r = row + warp_row + 8 * half + lane / 4;
          const float capped = score.mod.capped(element);
          const float weight = rows[half].weight(full_score(score, capped, r, first + k, is_attended));
          const float grad_score = weight * (score.dropped(grad[0][n][e], is_kept(kept, n, e)) - rows[half].delta);
          if (t.grad_alibi_slopes) grad_slope[half] += grad_score * score.alibi_derivative(r, first + k);
          element = grad_score * score.mod.capped_derivative(capped);
        } else {
          element = is_attended ? rows[half].plain_weight(element, factor) * (grad[0][n][e] - rows[half].delta) : 0.0f;
        }
      }
    }
    if (t.grad_query.defined()) multiply<1, kDim>(result, x, shared.step[step % 2].dots, 0);
  }

  if (steps == 0) {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  if (kFull && t.grad_alibi_slopes) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + warp_row + 8 * half + lane / 4;
      const float total = row_sum(grad_slope[half]);
      if (lane % 4 == 0 && r < queries) statistics.grad_slope[p.first_row(batch, head) + r] = total;
    }
  }
  if (t.grad_query.defined()) {
    const float scale = kFull ? 1.0f : score.mod.scale, factors[1][2] = {{scale, scale}};
    const Rows<T> to(t.grad_query, batch, head, queries, p.head_dim, p.first_query(batch));
    store_rows<1, kDim>(to, row + warp_row, 0, result, factors, shared.dots, warp_row);
  }
}

template <class T, int kDim, bool kFull>
void query_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  const int64_t tiles = (p.query_length + BackwardShape<T, kDim>::kRows - 1) / BackwardShape<T, kDim>::kRows;
  launch(query_gradient_kernel<T, kDim, kFull>, p.batch * p.heads * tiles, kThreads, sizeof(BackwardShared<T, kDim>),
         stream, p, t, RowStatistics<float>(p, workspace));
}

}  // namespace torch_attn::cuda::sm80
