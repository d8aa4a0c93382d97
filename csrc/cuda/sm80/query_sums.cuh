// The float32 sums in which all_gradients.cuh, of this tier and of sm90, add up grad_query (query_sums.h), on the GPU:
// where they lie, and how they become grad_query.
#pragma once

#include "../launch.h"
#include "query_sums.h"
#include "tile.cuh"

namespace torch_attn::cuda::sm80 {

// The sums of the 16 rows from `row`, a multiple of 16, on.
template <int kDim>
TA_DEVICE float* query_sums(float* sums, const AttentionProblem& p, int batch, int head, int row) {
  return sums + int64_t{QuerySums::first_tile(p, batch, head) * QuerySums::kRows + row} * kDim;
}

// The 128 sums of 16 rows and 8 columns, which a warp's accumulators hold, come in the order in which it adds to them:
// one element of all its lanes after the other, or, where four elements are added at once, lane after lane.
struct ElementsApart {
  static constexpr int kLane = 1, kElement = 32;
};
struct LanesApart {
  static constexpr int kLane = 4, kElement = 1;
};

// The sums, times `scale`, become grad_query: a block for 64 rows of a head.
template <class T, int kDim, class Order>
__global__ void __launch_bounds__(kThreads)
    store_query_sums_kernel(const __grid_constant__ AttentionProblem p, const TensorView grad_query, float* const sums,
                            const float scale) {
  TA_DYNAMIC_SHARED(memory);
  auto& tile = *reinterpret_cast<Tile<T, QuerySums::kRows, kDim>*>(memory);
  const int64_t tiles = ceil_div(p.query_length, QuerySums::kRows);
  const int head = static_cast<int>(blockIdx.x / tiles % p.heads);
  const int batch = static_cast<int>(blockIdx.x / tiles / p.heads), warp_row = 16 * warp_index();
  const int tile_row = static_cast<int>(blockIdx.x % tiles) * QuerySums::kRows, row = tile_row + warp_row;
  const int64_t queries = p.queries_of(batch);
  if (tile_row >= queries) return;  // of a packed sequence shorter than others
  const float* const from = query_sums<kDim>(sums, p, batch, head, row) + lane_index() * Order::kLane;
  float result[1][kDim / 8][4];
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[0][n][i] = from[128 * n + i * Order::kElement];
  const float factors[1][2] = {{scale, scale}};
  const Rows<T> to(grad_query, batch, head, queries, p.head_dim, p.first_query(batch));
  store_rows<1, kDim>(to, row, 0, result, factors, tile, warp_row);
}

template <class T, int kDim, class Order>
void store_query_sums(const AttentionProblem& p, const TensorView& grad_query, float* sums, float scale,
                      const Stream& stream) {
  launch(store_query_sums_kernel<T, kDim, Order>, p.batch * p.heads * QuerySums::tiles(p), kThreads,
         sizeof(Tile<T, QuerySums::kRows, kDim>), stream, p, grad_query, sums, scale);
}

}  // namespace torch_attn::cuda::sm80
