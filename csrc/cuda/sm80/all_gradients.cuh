// grad_query, grad_key and grad_value in one kernel (Dao 2023, "FlashAttention-2", algorithm 2), for calls that need
// not be deterministic: one block per 128 keys of a key/value head, which adds its part of grad_query to float32 sums
// with atomics. Scores and their gradients are computed once, five products in all; query_gradient.cuh and
// key_value_gradient.cuh, which add nothing with atomics, need seven. Tiles of scores are transposed, rows are keys.
#pragma once

#include "gradient_steps.cuh"
#include "query_sums.cuh"

namespace torch_attn::cuda::sm80 {

constexpr int kFusedWarps = kFusedKeys / 16, kFusedThreads = 32 * kFusedWarps;

// Query rows of a step, bounded by registers: the gradients' accumulators take kDim of a thread's 255.
template <int kDim>
inline constexpr int kFusedStep = kDim <= 64 ? 64 : 32;

template <class T, int kDim>
struct FusedShared {
  static constexpr int kStep = kFusedStep<kDim>;
  struct Pair {
    Tile<T, kStep, kDim> query, grad_out;
  };
  Tile<T, kFusedKeys, kDim> key, value;
  Pair step[2];
  Tile<T, kFusedKeys, kStep> grad_score;
  int kv_head;  // for after the loop: a register less in it
};

// sum += (16 columns of a, from a_column on)ᵀ · b's columns [column, column + kColumns).
template <int kColumns, class A, class B>
TA_DEVICE void multiply_columns(float (&sum)[kColumns / 8][4], A& a, int a_column, B& b, int column) {
  static_assert(A::kRows == B::kRows, "");
  const typename B::Element type{};
  const int lane = lane_index();
  const LanePieces<A> a_pieces(a, lane % 8 + lane / 16 * 8, lane / 8 % 2 * kPiece<typename A::Element>);
  const LanePieces<B> b_pieces(b, lane % 16, lane / 16 * kPiece<typename B::Element>);
#pragma unroll
  for (int k = 0; k < B::kRows; k += 16) {
    uint32_t left[4];
    ptx::ldmatrix_x4_trans(left, a_pieces.at(k, a_column));
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, b_pieces.at(k, column + n));
      ptx::mma_m16n8k16(sum[n / 8], left, right[0], right[1], type);
      ptx::mma_m16n8k16(sum[n / 8 + 1], left, right[2], right[3], type);
    }
  }
}

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kFusedThreads)
    all_gradients_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardTensors t,
                         const RowStatistics<float> statistics, float* const sums) {
  constexpr int kStep = kFusedStep<kDim>, kColumns = kDim * kStep / kFusedKeys;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<FusedShared<T, kDim>*>(memory);

  // Of 32 bits: registers are short here.
  const int tiles = static_cast<int>(ceil_div(p.key_length, kFusedKeys)), kv_heads = static_cast<int>(p.kv_heads);
  const int index = static_cast<int>(blockIdx.x), first = index % tiles * kFusedKeys;
  const int kv_head = index / tiles % kv_heads, batch = index / tiles / kv_heads;
  // Lengths and starts are asked for where they are needed, not kept.
  if (first >= p.keys_of(batch)) return;  // of a packed sequence shorter than others
  const int lane = lane_index(), warp_row = 16 * warp_index();
  // Of a step's grad_query, this warp computes 16 rows and kColumns columns.
  const int query_row = warp_row % kStep, query_column = warp_row / kStep * kColumns;

  const Rows<T> key(p.key, batch, kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch));
  const Rows<T> value(p.value, batch, kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch));
  RowSteps<kStep> step(p, batch, kv_head, first, kFusedKeys);
  if (threadIdx.x == 0) shared.kv_head = kv_head;
  const bool any_step = !step.done();
  const auto copy_step = [&](auto& pair, const RowSteps<kStep>& to) {
    const int64_t queries = p.queries_of(batch), first_query = p.first_query(batch);
    copy_tile<kFusedThreads>(pair.query, Rows<T>(p.query, batch, to.head, queries, p.head_dim, first_query), to.row);
    copy_tile<kFusedThreads>(pair.grad_out, Rows<T>(t.grad_out, batch, to.head, queries, p.value_dim, first_query),
                             to.row);
  };
  copy_tile<kFusedThreads>(shared.key, key, first);
  copy_tile<kFusedThreads>(shared.value, value, first);
  if (any_step) copy_step(shared.step[0], step);
  ptx::cp_async_commit();

  float grad_key[1][kDim / 8][4] = {}, grad_value[1][kDim / 8][4] = {};
  for (int buffer = 0; !step.done(); buffer ^= 1) {
    const int head = step.head;
    const HeadScore<float> score(p, batch, head);
    const int row = step.row, row_end = row + kStep < score.query_length ? row + kStep : score.query_length;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles have landed, and the last step's are read no more
    step.advance();
    if (!step.done()) copy_step(shared.step[buffer ^ 1], step);
    ptx::cp_async_commit();

    auto& pair = shared.step[buffer];
    float x[1][kStep / 8][4] = {}, grad[1][kStep / 8][4] = {};
    multiply_transposed<1>(x, shared.key, warp_row, pair.query);
    multiply_transposed<1>(grad, shared.value, warp_row, pair.grad_out);
    const bool tested = kFull ? !score.inside(row, row + kStep, first, first + kFusedKeys)
                              : !score.covered(row, row_end, first, first + kFusedKeys);
    weights_and_gradients<kFull>(x, grad, score, BackwardRows<float>(score, t, statistics, row), first + warp_row, row,
                                 tested);
    if (t.grad_value.defined()) multiply<1, kDim>(grad_value, x, pair.grad_out, 0);
    if (kFull)
      to_gradients_of_products(
          grad, score.mod, [&](auto& products) { multiply_transposed<1>(products, shared.key, warp_row, pair.query); });
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(shared.grad_score.piece(warp_row + 8 * half + lane / 4, 8 * n) + 2 * (lane % 4),
                   grad[0][n][2 * half], grad[0][n][2 * half + 1]);
    if (t.grad_key.defined()) multiply<1, kDim>(grad_key, grad, pair.query, 0);

    __syncthreads();  // grad_score is whole
    float grad_query[kColumns / 8][4] = {};
    multiply_columns<kColumns>(grad_query, shared.grad_score, query_row, shared.key, query_column);
    float* const to = query_sums<kDim>(sums, p, batch, head, row + query_row) + query_column / 8 * 128 + lane;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) atomicAdd(to + (4 * n + i) * 32, grad_query[n][i]);
  }

  if (!any_step) ptx::cp_async_wait<0>();
  __syncthreads();  // the keys are read no more: their tile takes a result on its way to memory
  const float key_scale = score_factor<kFull>(p), key_factors[1][2] = {{key_scale, key_scale}};
  const float keep_scale = value_factor<kFull>(p), value_factors[1][2] = {{keep_scale, keep_scale}};
  if (t.grad_key.defined())
    store_rows<1, kDim>(Rows<T>(t.grad_key, batch, shared.kv_head, p.keys_of(batch), p.head_dim, p.first_key(batch)),
                        first + warp_row, 0, grad_key, key_factors, shared.key, warp_row);
  if (t.grad_value.defined())
    store_rows<1, kDim>(Rows<T>(t.grad_value, batch, shared.kv_head, p.keys_of(batch), p.value_dim, p.first_key(batch)),
                        first + warp_row, 0, grad_value, value_factors, shared.value, warp_row);
}

template <class T, int kDim, bool kFull>
void all_gradients(const AttentionProblem& p, const BackwardTensors& t, void* statistics, void* workspace,
                   const Stream& stream) {
  float* const sums = static_cast<float*>(workspace);
  clear(sums, QuerySums::bytes(p, kDim), stream);
  const int64_t tiles = (p.key_length + kFusedKeys - 1) / kFusedKeys;
  launch(all_gradients_kernel<T, kDim, kFull>, p.batch * p.kv_heads * tiles, kFusedThreads,
         sizeof(FusedShared<T, kDim>), stream, p, t, RowStatistics<float>(p, statistics), sums);
  store_query_sums<T, kDim, ElementsApart>(p, t.grad_query, sums, score_factor<kFull>(p), stream);
}

}  // namespace torch_attn::cuda::sm80
