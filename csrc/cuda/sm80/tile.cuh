// Tiles of 16-bit elements in shared memory, and the two products of attention on tensor cores (mma.m16n8k16).
//
// A tile holds kRows rows of kDim elements. The 16-byte pieces of a row are permuted by the row number, so that the
// eight rows that one ldmatrix reads, and the pieces that one copy writes, lie in different banks.
//
// Accumulators are float[kM][n / 8][4], the layout of mma: lane l holds rows l / 4 (elements 0 and 1) and l / 4 + 8
// (elements 2 and 3) of each group of 16, at columns 2 (l % 4) and the next of each group of 8.
#pragma once

#include "../head_score.cuh"

namespace torch_attn::cuda::sm80 {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kPiece = 8;  // elements of 16 bytes

template <class T, int kRowCount, int kDimension>
struct Tile {
  using Element = T;
  static constexpr int kRows = kRowCount, kDim = kDimension;
  static_assert(kDim % 64 == 0, "the permutation needs eight pieces");

  T element[kRows * kDim];

  TA_DEVICE T* piece(int row, int column) { return element + row * kDim + (column ^ row % 8 * kPiece); }
};

// A lane's pieces in the rows `row`, row + 8, … of a tile. Stepping through them costs no register for each: only the
// lowest bits of an address depend on the lane, all else is a constant of the unrolled loop.
template <class Tile>
struct LanePieces {
  typename Tile::Element* start;
  int permuted;  // below 64

  // offset: 0 or kPiece, what the lane adds to every column.
  TA_DEVICE LanePieces(Tile& tile, int row, int offset)
      : start(tile.element + row * Tile::kDim), permuted(offset ^ row % 8 * kPiece) {}
  // rows: a multiple of 8. column: a multiple of 16.
  TA_DEVICE typename Tile::Element* at(int rows, int column) const {
    return start + rows * Tile::kDim + column / 64 * 64 + (column % 64 ^ permuted);
  }
};

// The rows of one head in global memory: 16-byte aligned, columns a multiple of 8.
template <class T>
struct Rows {
  T* data;
  int64_t stride, count;
  int columns;

  TA_DEVICE Rows(const TensorView& view, int64_t batch, int64_t head, int64_t row_count, int64_t column_count)
      : data(static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1]),
        stride(view.stride[2]),
        count(row_count),
        columns(static_cast<int>(column_count)) {}
};

// Starts the block's copy of rows [row, row + kRows); zeros outside.
template <class Tile, class T>
TA_DEVICE void copy_tile(Tile& tile, const Rows<T>& rows, int64_t row) {
  constexpr int kPieces = Tile::kDim / kPiece, kRowsAtOnce = kThreads / kPieces;
  static_assert(Tile::kRows % kRowsAtOnce == 0, "every thread copies the same number of pieces");
  const int first = static_cast<int>(threadIdx.x) / kPieces, column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
  const int left = rows.count - row < Tile::kRows ? static_cast<int>(rows.count - row) : Tile::kRows;
  const T* from = rows.data + (row + first) * rows.stride + column;
  const int64_t step = kRowsAtOnce * rows.stride;
#pragma unroll
  for (int r = 0; r < Tile::kRows; r += kRowsAtOnce) {
    const bool valid = first + r < left && column < rows.columns;
    ptx::cp_async_16(tile.piece(first + r, column), valid ? from : rows.data, valid);
    from += step;
  }
}

TA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
TA_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// sum[m] += (16 rows of a from `row` + 16m on) · (all rows of b)ᵀ.
template <int kM, class A, class B>
TA_DEVICE void multiply_transposed(float (&sum)[kM][B::kRows / 8][4], A& a, int row, B& b) {
  static_assert(A::kDim == B::kDim, "");
  const int lane = lane_index();
  const LanePieces<A> a_pieces(a, row + lane % 16, lane / 16 * kPiece);
  const LanePieces<B> b_pieces(b, lane % 8 + lane / 16 * 8, lane / 8 % 2 * kPiece);
#pragma unroll
  for (int k = 0; k < A::kDim; k += 16) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(left[m], a_pieces.at(16 * m, k));
#pragma unroll
    for (int n = 0; n < B::kRows; n += 16) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b_pieces.at(n, k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16(sum[m][n / 8], left[m], right[0], right[1], typename A::Element{});
        ptx::mma_m16n8k16(sum[m][n / 8 + 1], left[m], right[2], right[3], typename A::Element{});
      }
    }
  }
}

// sum[m] += (weights[m], rounded to the tile's type) · b's columns [column, column + kColumns).
template <int kM, int kColumns, class B>
TA_DEVICE void multiply(float (&sum)[kM][kColumns / 8][4], const float (&weights)[kM][B::kRows / 8][4], B& b,
                        int column) {
  const typename B::Element type{};
  const int lane = lane_index();
  const LanePieces<B> b_pieces(b, lane % 16, lane / 16 * kPiece);
#pragma unroll
  for (int k = 0; k < B::kRows; k += 16) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&w)[4] = weights[m][k / 8 + i / 2];
        left[m][i] = ptx::pack(w[i % 2 * 2], w[i % 2 * 2 + 1], type);
      }
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, b_pieces.at(k, column + n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16(sum[m][n / 8], left[m], right[0], right[1], type);
        ptx::mma_m16n8k16(sum[m][n / 8 + 1], left[m], right[2], right[3], type);
      }
    }
  }
}

// Writes a warp's accumulators, times factor[m][half], to columns [column, column + kColumns) of global rows from `row`
// on. They pass through the warp's own rows of `tile`, which it alone has read, so that whole 16-byte pieces are
// stored.
template <int kM, int kColumns, class Tile, class T>
TA_DEVICE void store_rows(const Rows<T>& to, int64_t row, int column, const float (&sum)[kM][kColumns / 8][4],
                          const float (&factor)[kM][2], Tile& tile, int tile_row) {
  static_assert(Tile::kDim >= kColumns, "");
  const int lane = lane_index();
  __syncwarp();  // the warp's last reads of these rows
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        T* const piece = tile.piece(tile_row + 16 * m + 8 * half + lane / 4, 8 * n);
        *reinterpret_cast<uint32_t*>(piece + 2 * (lane % 4)) =
            ptx::pack(sum[m][n][2 * half] * factor[m][half], sum[m][n][2 * half + 1] * factor[m][half], T{});
      }
  __syncwarp();
  constexpr int kPieces = kColumns / kPiece;
#pragma unroll
  for (int i = lane; i < 16 * kM * kPieces; i += 32) {
    const int r = i / kPieces, c = i % kPieces * kPiece;
    if (row + r < to.count && column + c < to.columns)
      *reinterpret_cast<Bits128*>(to.data + (row + r) * to.stride + column + c) =
          *reinterpret_cast<const Bits128*>(tile.piece(tile_row + r, c));
  }
}

// Over the four lanes that share rows.
TA_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
TA_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

}  // namespace torch_attn::cuda::sm80
