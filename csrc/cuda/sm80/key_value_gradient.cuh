// grad_key and grad_value on tensor cores: one block per 64 keys of a key/value head and kColumns columns of the
// gradients. The query rows of all query heads that read the head stream through two buffers. Tiles are transposed,
// rows are keys.
#pragma once

#include "gradient_steps.cuh"
#include "query_gradient.cuh"

namespace torch_attn::cuda::sm80 {

// Both gradients' accumulators take kColumns of a thread's 255 registers.
template <int kDim>
inline constexpr int kGradientColumns = kDim <= 128 ? kDim : 128;

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kThreads)
    key_value_gradient_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                              const RowStatistics<float> statistics) {
  using Shape = BackwardShape<T, kDim>;
  constexpr int kStep = Shape::kStep, kColumns = kGradientColumns<kDim>;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<BackwardShared<T, kDim>*>(memory);

  const int64_t tiles = ceil_div(p.key_length, Shape::kRows);
  int64_t index = blockIdx.x;
  const int column = static_cast<int>(index % (kDim / kColumns)) * kColumns;
  index /= kDim / kColumns;
  const int64_t first = index % tiles * Shape::kRows;
  index /= tiles;
  const int64_t kv_head = index % p.kv_heads, batch = index / p.kv_heads;
  // Lengths and starts are asked for where they are needed, not kept: registers are short here.
  if (first >= p.keys_of(batch)) return;  // of a packed sequence shorter than others
  const int warp_row = 16 * warp_index();

  const Rows<T> key(p.key, batch, kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch));
  const Rows<T> value(p.value, batch, kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch));
  RowSteps<kStep> step(p, batch, kv_head, first, Shape::kRows);
  const bool any_step = !step.done();
  const auto copy_step = [&](auto& pair, const RowSteps<kStep>& to) {
    const int64_t queries = p.queries_of(batch), first_query = p.first_query(batch);
    copy_tile(pair.dots, Rows<T>(p.query, batch, to.head, queries, p.head_dim, first_query), to.row);
    copy_tile(pair.grads, Rows<T>(t.grad_out, batch, to.head, queries, p.value_dim, first_query), to.row);
  };
  copy_tile(shared.dots, key, first);
  copy_tile(shared.grads, value, first);
  if (any_step) copy_step(shared.step[0], step);
  ptx::cp_async_commit();

  float grad_key[1][kColumns / 8][4] = {}, grad_value[1][kColumns / 8][4] = {};
  for (int buffer = 0; !step.done(); buffer ^= 1) {
    const HeadScore<float> score(p, batch, step.head);
    const int64_t row = step.row, row_end = row + kStep < score.query_length ? row + kStep : score.query_length;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles have landed, and the last step's are read no more
    step.advance();
    if (!step.done()) copy_step(shared.step[buffer ^ 1], step);
    ptx::cp_async_commit();

    auto& pair = shared.step[buffer];
    float x[1][kStep / 8][4] = {}, grad[1][kStep / 8][4] = {};
    multiply_transposed<1>(x, shared.dots, warp_row, pair.dots);
    multiply_transposed<1>(grad, shared.grads, warp_row, pair.grads);
    const bool tested = kFull ? !score.inside(row, row + kStep, first, first + Shape::kRows)
                              : !score.covered(row, row_end, first, first + Shape::kRows);
    weights_and_gradients<kFull>(x, grad, score, BackwardRows<float>(score, t, statistics, row), first + warp_row, row,
                                 tested);
    if (t.grad_value.defined()) multiply<1, kColumns>(grad_value, x, pair.grads, column);
    if (kFull)
      to_gradients_of_products(
          grad, score.mod, [&](auto& products) { multiply_transposed<1>(products, shared.dots, warp_row, pair.dots); });
    if (t.grad_key.defined()) multiply<1, kColumns>(grad_key, grad, pair.dots, column);
  }

  if (!any_step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  const float key_scale = score_factor<kFull>(p), key_factors[1][2] = {{key_scale, key_scale}};
  const float keep_scale = value_factor<kFull>(p), value_factors[1][2] = {{keep_scale, keep_scale}};
  if (t.grad_key.defined())
    store_rows<1, kColumns>(Rows<T>(t.grad_key, batch, kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch)),
                            first + warp_row, column, grad_key, key_factors, shared.dots, warp_row);
  if (t.grad_value.defined())
    store_rows<1, kColumns>(Rows<T>(t.grad_value, batch, kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch)),
                            first + warp_row, column, grad_value, value_factors, shared.grads, warp_row);
}

template <class T, int kDim, bool kFull>
void key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* statistics, const Stream& stream) {
  constexpr int kRows = BackwardShape<T, kDim>::kRows;
  const int64_t tiles = (p.key_length + kRows - 1) / kRows;
  launch(key_value_gradient_kernel<T, kDim, kFull>, p.batch * p.kv_heads * tiles * (kDim / kGradientColumns<kDim>),
         kThreads, sizeof(BackwardShared<T, kDim>), stream, p, t, RowStatistics<float>(p, statistics));
}

}  // namespace torch_attn::cuda::sm80
