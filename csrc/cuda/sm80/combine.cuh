// Merges what the splits of decode.cuh found, in the splits' order: a warp for each query row.
#pragma once

#include "../launch.h"
#include "../row_statistics.cuh"
#include "key_splits.h"
#include "tile.cuh"

namespace torch_attn::cuda::sm80 {

constexpr int kCombineThreads = 128;

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardOutputs out,
                   const Partials partials) {
  using Softmax = OnlineSoftmax<Math<float>>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index = int64_t{blockIdx.x} * (kCombineThreads / 32) + threadIdx.x / 32;  // of (B, Hq, L)
  if (index >= partials.rows) return;
  const int64_t row = index % p.query_length, head = index / p.query_length % p.heads;
  const int64_t batch = index / p.query_length / p.heads;
  if (row >= p.queries_of(batch)) return;  // of a packed sequence shorter than others; of the whole warp

  const float sink = p.sinks.defined() ? per_head<float>(p.sinks, batch, head) : -INFINITY;
  float maximum = sink;
  for (int split = lane; split < partials.splits; split += 32)
    maximum = fmaxf(maximum, partials.maximum[split * partials.rows + index]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
  float total = lane == 0 && sink != -INFINITY ? Softmax::rescale(sink, maximum) : 0.0f;
  for (int split = lane; split < partials.splits; split += 32) {
    const int64_t at = split * partials.rows + index;
    total += partials.sum[at] * Softmax::rescale(partials.maximum[at], maximum);
  }
  total = warp_sum(total);

  const float keep_scale = p.dropout_p > 0 ? static_cast<float>(Dropout::keep_scale(p.dropout_p)) : 1.0f;
  const float factor = Softmax::inverse_sum(total) * keep_scale;
  T* const to = static_cast<T*>(out.out.data) + batch * out.out.stride[0] + head * out.out.stride[1] +
                (p.first_query(batch) + row) * out.out.stride[2];
  for (int c = 4 * lane; c < partials.value_dim; c += 4 * 32) {
    float result[4] = {};
    for (int split = 0; split < partials.splits; ++split) {
      const int64_t at = split * partials.rows + index;
      if (partials.sum[at] == 0) continue;
      const float rescale = Softmax::rescale(partials.maximum[at], maximum);
      const Bits128 bits = *reinterpret_cast<const Bits128*>(partials.out + at * partials.value_dim + c);
      float part[4];
      memcpy(part, &bits, sizeof(bits));
#pragma unroll
      for (int e = 0; e < 4; ++e) result[e] += part[e] * rescale;
    }
    store_pair(to + c, result[0] * factor, result[1] * factor);
    store_pair(to + c + 2, result[2] * factor, result[3] * factor);
  }
  if (lane == 0)
    static_cast<float*>(out.logsumexp)[p.first_row(batch, head) + row] = Softmax::logsumexp(maximum, total);
}

template <class T>
void combine(const AttentionProblem& p, const ForwardOutputs& out, int splits, void* workspace, const Stream& stream) {
  const int64_t rows = p.batch * p.heads * p.query_length, rows_of_block = kCombineThreads / 32;
  launch(combine_kernel<T>, (rows + rows_of_block - 1) / rows_of_block, kCombineThreads, 0, stream, p, out,
         Partials(p, splits, workspace));
}

}  // namespace torch_attn::cuda::sm80
