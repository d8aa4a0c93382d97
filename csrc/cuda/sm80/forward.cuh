// The forward pass on tensor cores (Dao 2023, "FlashAttention-2", algorithm 1): one block per 64 · kM query rows. Keys
// and values stream through two buffers each; while one is used, cp.async fills the other.
#pragma once

#include "../launch.h"
#include "lane_scores.cuh"

namespace torch_attn::cuda::sm80 {

// kM: groups of 16 rows a warp owns. kKeys: keys of a step. Both are bounded by registers: the output's accumulators
// take kM · kDim / 2 of the 255, the scores kM · kKeys / 2, and a full kernel's options some more; those of float by
// shared memory, too.
template <class T, int kDim, bool kFull>
struct ForwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kM = kDim <= (kFull || kWide ? 64 : 128) ? 2 : 1;
  static constexpr int kKeys = !kWide && kDim == (kFull ? 128 : 64) ? 64 : 32;
  static constexpr int kRows = 16 * kM * kWarps;
};

template <class T, int kDim, bool kFull>
struct ForwardShared {
  using Shape = ForwardShape<T, kDim, kFull>;
  Tile<T, Shape::kRows, kDim> query;
  Tile<T, Shape::kKeys, kDim> key[2], value[2];
  // Where the results belong, for after the loop: 255 registers do not hold it beside the accumulators.
  int64_t first_row;
  int batch, head, queries;
};

template <class T, int kDim, bool kFull>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out) {
  using Shape = ForwardShape<T, kDim, kFull>;
  using Softmax = OnlineSoftmax<Math<float>>;
  constexpr int kM = Shape::kM, kKeys = Shape::kKeys, kGroups = kKeys / 8;
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ForwardShared<T, kDim, kFull>*>(memory);

  const int64_t tiles = ceil_div(p.query_length, Shape::kRows);
  int64_t index = blockIdx.x;
  const int row =
      static_cast<int>((tiles - 1 - index % tiles) * Shape::kRows);  // the longest rows of a causal mask first
  index /= tiles;
  // Of 32 bits: registers are short here.
  const int head = static_cast<int>(index % p.heads), batch = static_cast<int>(index / p.heads);
  const int queries = static_cast<int>(p.queries_of(batch));
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int row_end = row + Shape::kRows < queries ? row + Shape::kRows : queries;
  const int lane = lane_index(), warp_row = 16 * kM * warp_index();
  if (threadIdx.x == 0) {
    shared.first_row = p.first_row(batch, head);
    shared.batch = batch, shared.head = head, shared.queries = queries;
  }

  const HeadScore<float> score(p, batch, head);
  const int64_t kv_head = head / p.group_size();
  const Rows<T> query(p.query, batch, head, queries, p.head_dim, p.first_query(batch));
  const int64_t keys = keys_to_read<kFull>(p, score, batch), first_key = p.first_key(batch);
  const KeysOf<T, kFull> key(p.key, batch, kv_head, keys, p.head_dim, first_key);
  const KeysOf<T, kFull> value(p.value, batch, kv_head, keys, p.value_dim, first_key);

  // weight = 2^((x − maximum) · factor). x is the score; in a plain kernel q·k, and the factor holds the scale.
  const float unit = kFull ? 1.0f : score.mod.scale, factor = unit * kLog2E;
  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) / unit : -INFINITY;
  float maximum[kM][2], sum[kM][2], result[kM][kDim / 8][4] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[m][half] = sink;
      sum[m][half] = sink != -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;  // of four lanes, to be added at the end
    }

  const KeyRange range = score.band.keys_of_any(row, row_end);
  const int begin = static_cast<int>(range.begin / kKeys * kKeys);
  const int steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kKeys));
  copy_tile(shared.query, query, row);
  if (steps > 0) copy_tile(shared.key[0], key, begin);
  ptx::cp_async_commit();
  if (steps > 0) copy_tile(shared.value[0], value, begin);
  ptx::cp_async_commit();

  for (int step = 0; step < steps; ++step) {
    const int first = begin + step * kKeys;
    ptx::cp_async_wait<1>();  // this step's keys, and the queries
    __syncthreads();
    if (step + 1 < steps) copy_tile(shared.key[(step + 1) % 2], key, first + kKeys);
    ptx::cp_async_commit();

    const bool tested = kFull ? !score.inside(row, row + Shape::kRows, first, first + kKeys)
                              : !score.covered(row, row_end, first, first + kKeys);
    const auto lane_rows = [&] {
      return QueryRows<2 * kM, 2 * kGroups>(score, row + warp_row + lane / 4, first, tested);
    };
    BoolRows<2 * kM, 2 * kGroups> bool_rows;
    if constexpr (kFull) bool_rows = lane_rows().bool_rows();  // under way during the product
    float x[kM][kGroups][4] = {};
    multiply_transposed<kM>(x, shared.query, warp_row, shared.key[step % 2]);
    if constexpr (kFull) {
      as_rows(x, [&](auto& scores) {
        cap_scores(scores, score.mod);
        lane_rows().finish(scores, bool_rows);
      });
    } else if (tested) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = row + warp_row + 16 * m + 8 * half + lane / 4;
          set_unattended(x[m], half, TileRange::keys_of_row(score, r, first, kKeys), -INFINITY);
        }
    }

#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float rescale = softmax_row<kFull>(x[m], half, maximum[m][half], sum[m][half], factor);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          result[m][n][2 * half] *= rescale;
          result[m][n][2 * half + 1] *= rescale;
        }
      }
    if (kFull && score.dropout_on) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t kept = 0;
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          if (n % 4 == 0) kept = kept_of_query_rows(score, row + warp_row + 16 * m, first + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (!is_kept_in_query_rows(kept, n, e)) x[m][n][e] = 0;
        }
      }
    }

    ptx::cp_async_wait<1>();  // this step's values
    __syncthreads();
    if (step + 1 < steps) copy_tile(shared.value[(step + 1) % 2], value, first + kKeys);
    ptx::cp_async_commit();
    multiply<kM, kDim>(result, x, shared.value[step % 2], 0);
  }

  if (steps == 0) {  // nothing was attended: only the query's copy is to be waited for
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  float inverse[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(sum[m][half]);
      inverse[m][half] = Softmax::inverse_sum(total) * (kFull && score.dropout_on ? score.keep_scale : 1.0f);
      const int64_t r = row + warp_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < shared.queries)
        static_cast<float*>(out.logsumexp)[shared.first_row + r] = Softmax::logsumexp(maximum[m][half] * unit, total);
    }
  const Rows<T> to(out.out, shared.batch, shared.head, shared.queries, p.value_dim, p.first_query(shared.batch));
  store_rows<kM, kDim>(to, row + warp_row, 0, result, inverse, shared.query, warp_row);
}

template <class T, int kDim, bool kFull>
void forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  constexpr int kRows = ForwardShape<T, kDim, kFull>::kRows;
  const int64_t tiles = (p.query_length + kRows - 1) / kRows;
  launch(forward_kernel<T, kDim, kFull>, p.batch * p.heads * tiles, kThreads, sizeof(ForwardShared<T, kDim, kFull>),
         stream, p, out);
}

}  // namespace torch_attn::cuda::sm80
