// Matrices in shared memory as wgmma reads them: what the Hopper tier's kernels share.
#pragma once

#include "../ptx_sm90a.cuh"
#include "../sm80/score_tile.cuh"

// Machine code for other GPUs has these kernels without their bodies.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TA_HAS_WGMMA 1
#else
#define TA_HAS_WGMMA 0
#endif

namespace torch_attn::cuda::sm90 {

using sm80::copy_tile;
using sm80::Rows;
using sm80::Tile;

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // of wgmma
constexpr int kPartColumns = 64;    // of a line of 128 bytes

// Rows of kDim elements, cut into parts whose lines are those of wgmma; Tile's permutation of a line's pieces is the
// 128-byte swizzle.
template <class T, int kRows, int kDim>
struct Operand {
  Tile<T, kRows, kPartColumns> part[kDim / kPartColumns];

  static constexpr int kLine = 128, kGroup = 8 * kLine, kPart = kRows * kLine;

  // Starts the copy of rows [row, row + kRows) by kThreads threads; zeros outside. A thread's pieces lie in one column,
  // and in rows of one permutation.
  template <int kThreads>
  TA_DEVICE void copy(const Rows<T>& rows, int64_t row) {
    constexpr int kPieces = kDim / 8, kRowsAtOnce = kThreads / kPieces;
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "");
    const int thread = static_cast<int>(threadIdx.x) % kThreads, first = thread / kPieces;
    const int column = thread % kPieces * 8;
    const int left = column < rows.columns ? static_cast<int>(rows.count - row) - first : 0;
    const T* from = rows.data + (row + first) * rows.stride + column;
    T* const to = part[column / kPartColumns].piece(first, column % kPartColumns);
    const int64_t step = kRowsAtOnce * rows.stride;
#pragma unroll
    for (int r = 0; r < kRows; r += kRowsAtOnce) {
      ptx::cp_async_16(to + r * kPartColumns, from, r < left);
      from += step;
    }
  }
  // 64 or kRows rows from `row` on, elements [16 k, 16 k + 16) of each.
  TA_DEVICE ptx::SharedMatrix rows(int row, int k) const {
    const ptx::SharedMatrix all(part, kGroup, 0);
    return all.after(row * kLine + k / 4 * kPart + k % 4 * 32);
  }
  // Rows [16 k, 16 k + 16), each element of which, from a part's first on, is a row of the operand: transposed.
  TA_DEVICE ptx::SharedMatrix columns(int k, int first_part = 0) const {
    const ptx::SharedMatrix all(part, kGroup, kPart);
    return all.after(first_part * kPart + k * 2 * kGroup);
  }
};

// sm80::store_rows of a whole accumulator, through the warp's own rows of an operand.
template <class T, int kRows, int kDim>
TA_DEVICE void store_parts(const Rows<T>& to, int64_t row, const float (&sum)[kDim / 8][4], const float (&factor)[1][2],
                           Operand<T, kRows, kDim>& tile, int tile_row) {
#pragma unroll
  for (int c = 0; c < kDim / kPartColumns; ++c) {
    float part[1][kPartColumns / 8][4];
#pragma unroll
    for (int n = 0; n < kPartColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) part[0][n][i] = sum[kPartColumns / 8 * c + n][i];
    sm80::store_rows<1, kPartColumns>(to, row, c * kPartColumns, part, factor, tile.part[c], tile_row);
  }
}

// A warpgroup's product, whose rows are the next product's, rounded to be that one's left operand in registers: groups
// of eight columns from the first on.
template <class T, int kSteps, int kGroups>
TA_DEVICE void pack_weights(const float (&x)[kGroups][4], int first, uint32_t (&weights)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&group)[4] = x[first + 2 * k + i / 2];
      weights[k][i] = ptx::pack(group[i % 2 * 2], group[i % 2 * 2 + 1], T{});
    }
}

}  // namespace torch_attn::cuda::sm90
