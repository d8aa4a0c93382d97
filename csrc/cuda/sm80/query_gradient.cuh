// grad_query on tensor cores, and each row's part of grad_alibi_slopes: one block per 64 query rows. Keys and values
// stream through two buffers. The backward pass has this kernel and key_value_gradient.cuh, which both recompute the
// scores: seven products in place of five, and in exchange no atomics, so that gradients are the same in every run.
#pragma once

#include "../row_statistics.cuh"
#include "lane_scores.cuh"

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

    const bool tested = kFull ? !score.inside(row, row + Shape::kRows, first, first + Shape::kStep)
                              : !score.covered(row, row_end, first, first + Shape::kStep);
    const auto lane_rows = [&] { return QueryRows<2, 2 * kGroups>(score, row + warp_row + lane / 4, first, tested); };
    BoolRows<2, 2 * kGroups> bool_rows;
    if constexpr (kFull) bool_rows = lane_rows().bool_rows();
    float x[1][kGroups][4] = {}, grad[1][kGroups][4] = {};
    multiply_transposed<1>(x, shared.dots, warp_row, shared.step[step % 2].dots);
    multiply_transposed<1>(grad, shared.grads, warp_row, shared.step[step % 2].grads);
    if constexpr (kFull) {
      if (score.dropout_on) {
#pragma unroll
        for (int n = 0; n < kGroups; n += 4) {
          const uint32_t kept = kept_of_query_rows(score, row + warp_row, first + 8 * n);
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            float& element = grad[0][n + i / 4][i % 4];
            element = is_kept_in_query_rows(kept, i / 4, i % 4) ? element * score.keep_scale : 0.0f;
          }
        }
      }
      as_rows(x, [&](auto& scores) {
        cap_scores(scores, score.mod);
        lane_rows().finish(scores, bool_rows);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 2 * kGroups; ++i)
            scores[half][i] =
                rows[half].full_weight(scores[half][i]) * (grad[0][i / 2][2 * half + i % 2] - rows[half].delta);
        if (t.grad_alibi_slopes) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float to_first = lane_rows().to_first(half);
#pragma unroll
            for (int i = 0; i < 2 * kGroups; ++i)
              grad_slope[half] += scores[half][i] * ScoreMod<Math<float>>::alibi_derivative(
                                                        to_first + static_cast<float>(column_of_lane(i)));
          }
        }
      });
      to_gradients_of_products(x, score.mod, [&](auto& products) {
        multiply_transposed<1>(products, shared.dots, warp_row, shared.step[step % 2].dots);
      });
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tested) {
          const TileRange attended =
              TileRange::keys_of_row(score, row + warp_row + 8 * half + lane / 4, first, Shape::kStep);
          set_unattended(x[0], half, attended, -INFINITY);
          set_unattended(grad[0], half, attended, 0);  // whatever values, NaN even, were met there
        }
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
          float& element = x[0][i / 2][2 * half + i % 2];
          element = rows[half].plain_weight(element, factor) * (grad[0][i / 2][2 * half + i % 2] - rows[half].delta);
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
