// grad_attn_mask has the mask's own broadcast shape: one block per 64 x 64 tile of it. The block goes through
// everything that the mask was broadcast over (batches, heads, rows, keys) and sums in a fixed order, so the gradient
// is deterministic. For the mask gradients of attention, attention maps and hard attention.
#pragma once

#include "launch.h"
#include "numeric.cuh"

namespace torch_attn::cuda {

constexpr int kMaskTile = 64;

// The part of one dimension that a block covers: one index or tile of it, or all when the mask was broadcast over it.
struct Extent {
  int64_t begin, end;

  // Takes this dimension's index off the block index.
  TA_DEVICE static Extent take(int64_t& block, int64_t size, int64_t tile, int64_t mask_stride) {
    if (mask_stride == 0) return {0, size};
    const int64_t tiles = ceil_div(size, tile), begin = block % tiles * tile;
    block /= tiles;
    return {begin, begin + tile < size ? begin + tile : size};
  }
};

// What one block sums and writes.
struct MaskBlock {
  Extent keys, rows, heads, batches;

  TA_DEVICE MaskBlock(const AttentionProblem& p, const TensorView& mask) {
    int64_t block = blockIdx.x;
    keys = Extent::take(block, p.key_length, kMaskTile, mask.stride[3]);
    rows = Extent::take(block, p.query_length, kMaskTile, mask.stride[2]);
    heads = Extent::take(block, p.heads, 1, mask.stride[1]);
    batches = Extent::take(block, p.batch, 1, mask.stride[0]);
  }

  // The block's sums, a tile of kMaskTile x kMaskTile numbers in shared memory, to the mask's gradient, by `threads`
  // threads. Where the mask was broadcast over rows (keys), the tile's rows (keys) all belong to one element of it.
  template <class Real>
  TA_DEVICE void store(const TensorView& mask, const Real* tile, int pitch, int threads) const {
    const bool one_row = mask.stride[2] == 0, one_key = mask.stride[3] == 0;
    const int tile_rows = one_row ? 1 : static_cast<int>(rows.end - rows.begin);
    const int tile_keys = one_key ? 1 : static_cast<int>(keys.end - keys.begin);
    Real* const to = static_cast<Real*>(mask.data) + batches.begin * mask.stride[0] + heads.begin * mask.stride[1] +
                     rows.begin * mask.stride[2] + keys.begin * mask.stride[3];
    for (int i = threadIdx.x; i < tile_rows * tile_keys; i += threads) {
      const int r = i / tile_keys, k = i % tile_keys;
      Real total = 0;
      for (int r2 = r; r2 < (one_row ? kMaskTile : r + 1); ++r2) {
        Real of_row = 0;  // apart, so that a long sum loses fewer digits
        for (int k2 = k; k2 < (one_key ? kMaskTile : k + 1); ++k2) of_row += tile[r2 * pitch + k2];
        total += of_row;
      }
      to[r * mask.stride[2] + k * mask.stride[3]] = total;
    }
  }
};

inline int64_t mask_gradient_blocks(const AttentionProblem& p, const TensorView& mask) {
  const auto parts = [&](int dimension, int64_t size, int64_t tile) {
    return mask.stride[dimension] == 0 ? 1 : (size + tile - 1) / tile;
  };
  return parts(0, p.batch, 1) * parts(1, p.heads, 1) * parts(2, p.query_length, kMaskTile) *
         parts(3, p.key_length, kMaskTile);
}

}  // namespace torch_attn::cuda
