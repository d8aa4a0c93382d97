// The forward pass on Hopper's warpgroup matrix instructions, for scaled scores with a band mask (causal, windows, key
// lengths): one block per 64 query rows of each of its warpgroups. Keys and values stream through two buffers each;
// while one warpgroup is at its softmax, the tensor cores are another's (Shah et al. 2024, "FlashAttention-3", §3.1).
#pragma once

#include "../launch.h"
#include "../ptx_sm90a.cuh"
#include "../sm80/score_tile.cuh"
#include "variants.h"

// Machine code for other GPUs has these kernels without their bodies.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TA_HAS_WGMMA 1
#else
#define TA_HAS_WGMMA 0
#endif

namespace torch_attn::cuda::sm90 {

using sm80::copy_tile;
using sm80::lane_index;
using sm80::row_max;
using sm80::row_sum;
using sm80::Rows;
using sm80::Tile;
using sm80::TileRange;

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // of wgmma
constexpr int kPartColumns = 64;    // of a line of 128 bytes
constexpr int kCopiers = 2 * kWarpgroup;

// Registers bound the warpgroups: the scores take kKeys / 2 of a thread's, the output kDim / 2, the weights kKeys / 4.
template <int kDim>
struct ForwardShape {
  static constexpr int kWarpgroups = kDim <= 64 ? 3 : 2;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kRows = kWarpgroups * kWarpgroupRows;
  static constexpr int kKeys = 128;
};

// Rows of kDim elements, cut into parts whose lines are those of wgmma; Tile's permutation of a line's pieces is the
// 128-byte swizzle.
template <class T, int kRows, int kDim>
struct Operand {
  Tile<T, kRows, kPartColumns> part[kDim / kPartColumns];

  static constexpr int kLine = 128, kGroup = 8 * kLine, kPart = kRows * kLine;

  // By the block's first kCopiers threads.
  TA_DEVICE void copy(const Rows<T>& rows, int64_t row) {
    Rows<T> columns = rows;
#pragma unroll
    for (auto& tile : part) {
      copy_tile<kCopiers>(tile, columns, row);
      columns.data += kPartColumns;
      columns.columns -= kPartColumns;
    }
  }
  // 64 or kRows rows from `row` on, elements [16 k, 16 k + 16) of each.
  TA_DEVICE ptx::SharedMatrix rows(int row, int k) const {
    const ptx::SharedMatrix all(part, kGroup, 0);
    return all.after(row * kLine + k / 4 * kPart + k % 4 * 32);
  }
  // Rows [16 k, 16 k + 16), each element of which is a row of the operand: transposed.
  TA_DEVICE ptx::SharedMatrix columns(int k) const {
    const ptx::SharedMatrix all(part, kGroup, kPart);
    return all.after(k * 2 * kGroup);
  }
};

template <class T, int kDim>
struct ForwardShared {
  using Shape = ForwardShape<kDim>;
  Operand<T, Shape::kRows, kDim> query;
  Operand<T, Shape::kKeys, kDim> key[2], value[2];
};

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardShape<kDim>::kThreads, 1)
    forward_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out) {
#if TA_HAS_WGMMA
  using Shape = ForwardShape<kDim>;
  using Softmax = OnlineSoftmax<Math<float>>;
  constexpr int kKeys = Shape::kKeys, kGroups = kKeys / 8;
  const T type{};
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ForwardShared<T, kDim>*>(memory);

  const int tiles = static_cast<int>(ceil_div(p.query_length, Shape::kRows));
  const int index = static_cast<int>(blockIdx.x), heads = static_cast<int>(p.heads);
  const int row = (tiles - 1 - index % tiles) * Shape::kRows;  // the longest rows of a causal mask first
  const int head = index / tiles % heads, batch = index / tiles / heads;
  const int queries = static_cast<int>(p.queries_of(batch));
  if (row >= queries) return;  // of a packed sequence shorter than others
  const int row_end = row + Shape::kRows < queries ? row + Shape::kRows : queries;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index();
  const int group_row = thread / kWarpgroup * kWarpgroupRows, warp_row = thread / 32 * 16;
  const bool copies = thread < kCopiers;

  const HeadScore<float> score(p, batch, head);
  const int64_t kv_head = head / p.group_size(), keys = p.keys_of(batch), first_key = p.first_key(batch);
  const Rows<T> query(p.query, batch, head, queries, p.head_dim, p.first_query(batch));
  const Rows<T> key(p.key, batch, kv_head, keys, p.head_dim, first_key);
  const Rows<T> value(p.value, batch, kv_head, keys, p.value_dim, first_key);

  // weight = 2^((x − maximum) · factor), where x is q·k.
  const float factor = score.mod.scale * kLog2E;
  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) / score.mod.scale : -INFINITY;
  float maximum[2] = {sink, sink}, sum[2], result[kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) sum[half] = sink != -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;

  const KeyRange range = score.band.keys_of_any(row, row_end);
  const int begin = static_cast<int>(range.begin / kKeys * kKeys);
  const int steps = range.empty() ? 0 : static_cast<int>(ceil_div(range.end - begin, kKeys));
  if (copies) {
    shared.query.copy(query, row);
    if (steps > 0) shared.key[0].copy(key, begin);
  }
  ptx::cp_async_commit();
  if (copies && steps > 0) shared.value[0].copy(value, begin);
  ptx::cp_async_commit();

  for (int step = 0; step < steps; ++step) {
    const int first = begin + step * kKeys;
    ptx::cp_async_wait<1>();  // this step's keys, and the queries
    ptx::fence_shared_for_wgmma();
    __syncthreads();
    if (copies && step + 1 < steps) shared.key[(step + 1) % 2].copy(key, first + kKeys);
    ptx::cp_async_commit();

    float x[kGroups][4];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      ptx::wgmma(x, shared.query.rows(group_row, k), shared.key[step % 2].rows(0, k), k > 0, type);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(x);
    if (!score.covered(row + group_row, row + group_row + kWarpgroupRows, first, first + kKeys)) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sm80::set_unattended(x, half, TileRange::keys_of_row(score, row + warp_row + 8 * half + lane / 4, first, kKeys),
                             -INFINITY);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (int n = 0; n < kGroups; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
      largest = row_max(largest);
      const float safe = Softmax::safe_maximum(largest);
      const float rescale = maximum[half] == largest ? 1.0f : ptx::ex2_approx((maximum[half] - largest) * factor);
      maximum[half] = largest;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& element = x[n][2 * half + e];
          element = ptx::ex2_approx(element * factor - safe * factor);
          total += element;
        }
      sum[half] = sum[half] * rescale + total;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        result[n][2 * half] *= rescale;
        result[n][2 * half + 1] *= rescale;
      }
    }
    uint32_t weights[kKeys / 16][4];
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[k][i] = ptx::pack(x[2 * k + i / 2][i % 2 * 2], x[2 * k + i / 2][i % 2 * 2 + 1], type);

    ptx::cp_async_wait<1>();  // this step's values
    ptx::fence_shared_for_wgmma();
    __syncthreads();
    if (copies && step + 1 < steps) shared.value[(step + 1) % 2].copy(value, first + kKeys);
    ptx::cp_async_commit();
    ptx::hold(result);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) ptx::wgmma(result, weights[k], shared.value[step % 2].columns(k), type);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(result);
  }

  if (steps == 0) ptx::cp_async_wait<0>();  // nothing was attended: only the query's copy is to be waited for
  __syncthreads();                          // the queries are read no more: their tile takes the output
  float inverse[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = row_sum(sum[half]);
    inverse[0][half] = Softmax::inverse_sum(total);
    const int r = row + warp_row + 8 * half + lane / 4;
    if (lane % 4 == 0 && r < queries)
      static_cast<float*>(out.logsumexp)[p.first_row(batch, head) + r] =
          Softmax::logsumexp(maximum[half] * score.mod.scale, total);
  }
  const Rows<T> to(out.out, batch, head, queries, p.value_dim, p.first_query(batch));
#pragma unroll
  for (int c = 0; c < kDim / kPartColumns; ++c) {
    float part[1][kPartColumns / 8][4];
#pragma unroll
    for (int n = 0; n < kPartColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) part[0][n][i] = result[kPartColumns / 8 * c + n][i];
    sm80::store_rows<1, kPartColumns>(to, row + warp_row, c * kPartColumns, part, inverse, shared.query.part[c],
                                      warp_row);
  }
#endif
}

template <class T, int kDim>
void forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  using Shape = ForwardShape<kDim>;
  const int64_t tiles = (p.query_length + Shape::kRows - 1) / Shape::kRows;
  launch(forward_kernel<T, kDim>, p.batch * p.heads * tiles, Shape::kThreads, sizeof(ForwardShared<T, kDim>), stream, p,
         out);
}

}  // namespace torch_attn::cuda::sm90
