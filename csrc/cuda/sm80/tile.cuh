// Tiles of elements in shared memory, and the two products of attention on tensor cores: mma.m16n8k16 for 16-bit
// elements, mma.m16n8k8 in TF32 for float, whose operands are rounded on their way from shared memory.
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

// Elements of 16 bytes.
template <class T>
inline constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <class T, int kRowCount, int kDimension>
struct Tile {
  using Element = T;
  static constexpr int kRows = kRowCount, kDim = kDimension;
  static constexpr bool kNarrow = kDim == 4 * kPiece<T>;           // two rows lie in one round of the banks
  static constexpr int kPermuted = (kNarrow ? 4 : 8) * kPiece<T>;  // columns that change places with each other
  static_assert(kDim % kPermuted == 0, "the permutation needs four or eight pieces");

  T element[kRows * kDim];

  TA_DEVICE static int permutation(int row) { return (kNarrow ? row / 2 % 4 : row % 8) * kPiece<T>; }
  TA_DEVICE T* piece(int row, int column) { return element + row * kDim + (column ^ permutation(row)); }
};

// A lane's pieces in the rows `row`, row + 8, … of a tile. Stepping through them costs no register for each: only the
// lowest bits of an address depend on the lane, all else is a constant of the unrolled loop.
template <class Tile>
struct LanePieces {
  using Element = typename Tile::Element;
  static constexpr int kPermuted = Tile::kPermuted;

  Element* start;
  int permuted;  // below kPermuted

  // offset: 0 or kPiece, what the lane adds to every column.
  TA_DEVICE LanePieces(Tile& tile, int row, int offset)
      : start(tile.element + row * Tile::kDim), permuted(offset ^ Tile::permutation(row)) {}
  // rows: a multiple of 8. column: a multiple of 2 · kPiece.
  TA_DEVICE Element* at(int rows, int column) const {
    return start + rows * Tile::kDim + column / kPermuted * kPermuted + (column % kPermuted ^ permuted);
  }
};

// The rows of one head in global memory, from `first` on: 16-byte aligned, columns a multiple of kPiece.
template <class T>
struct Rows {
  T* data;
  int64_t stride, count;
  int columns;

  TA_DEVICE Rows(const TensorView& view, int64_t batch, int64_t head, int64_t row_count, int64_t column_count,
                 int64_t first = 0)
      : data(static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + first * view.stride[2]),
        stride(view.stride[2]),
        count(row_count),
        columns(static_cast<int>(column_count)) {}
};

// Starts the copy of rows [row, row + kRows) by kCopiers threads, a block or a warp of it; zeros outside.
template <int kCopiers = kThreads, class Tile, class T>
TA_DEVICE void copy_tile(Tile& tile, const Rows<T>& rows, int64_t row) {
  constexpr int kPieces = Tile::kDim / kPiece<T>, kRowsAtOnce = kCopiers / kPieces;
  static_assert(kRowsAtOnce > 0 && Tile::kRows % kRowsAtOnce == 0, "every thread copies the same number of pieces");
  const int thread = static_cast<int>(threadIdx.x) % kCopiers;
  const int first = thread / kPieces, column = thread % kPieces * kPiece<T>;
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

// Keys or values, which may lie in pages of a power of two of rows: the one place of this tier where these are looked
// up.
template <class T>
struct KeyRows : Rows<T> {
  const TensorView& view;  // a kernel's parameter: what is read of it takes no register
  int batch;

  TA_DEVICE KeyRows(const TensorView& view_, int64_t batch_, int64_t head, int64_t row_count, int64_t column_count,
                    int64_t first)
      : Rows<T>(view_, view_.pages ? 0 : batch_, head, row_count, column_count, first),
        view(view_),
        batch(static_cast<int>(batch_)) {}

  TA_DEVICE const T* paged_row(int64_t row) const {
    const int shift = log2_of(static_cast<int>(view.page_rows));
    const int64_t page = view.pages[batch * view.pages_stride + (row >> shift)];
    return this->data + page * view.stride[0] + (row & (view.page_rows - 1)) * this->stride;
  }
};

template <int kCopiers = kThreads, class Tile, class T>
TA_DEVICE void copy_tile(Tile& tile, const KeyRows<T>& rows, int64_t row) {
  if (!rows.view.pages) return copy_tile<kCopiers>(tile, static_cast<const Rows<T>&>(rows), row);
  constexpr int kPieces = Tile::kDim / kPiece<T>, kRowsAtOnce = kCopiers / kPieces;
  const int thread = static_cast<int>(threadIdx.x) % kCopiers;
  const int first = thread / kPieces, column = thread % kPieces * kPiece<T>;
  const int left = rows.count - row < Tile::kRows ? static_cast<int>(rows.count - row) : Tile::kRows;
#pragma unroll
  for (int r = 0; r < Tile::kRows; r += kRowsAtOnce) {
    const bool valid = first + r < left && column < rows.columns;
    ptx::cp_async_16(tile.piece(first + r, column), valid ? rows.paged_row(row + first + r) + column : rows.data,
                     valid);
  }
}

TA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
TA_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// Operands of an mma as ldmatrix brought them.
template <class T>
TA_DEVICE void round_operands(uint32_t (&)[4], T) {}
TA_DEVICE void round_operands(uint32_t (&operands)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x;
    memcpy(&x, &operands[i], 4);
    operands[i] = ptx::to_tf32(x);
  }
}

// d += a · b, of which b's columns are the tile's kind.
template <class T>
TA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  if constexpr (sizeof(T) == 4)
    ptx::mma_m16n8k8(d, a, b0, b1);
  else
    ptx::mma_m16n8k16(d, a, b0, b1, type);
}

// sum[m] += (16 rows of a from `row` + 16m on) · (all rows of b)ᵀ.
template <int kM, class A, class B>
TA_DEVICE void multiply_transposed(float (&sum)[kM][B::kRows / 8][4], A& a, int row, B& b) {
  static_assert(A::kDim == B::kDim, "");
  constexpr int kPieceSize = kPiece<typename A::Element>;
  const typename A::Element type{};
  const int lane = lane_index();
  const LanePieces<A> a_pieces(a, row + lane % 16, lane / 16 * kPieceSize);
  const LanePieces<B> b_pieces(b, lane % 8 + lane / 16 * 8, lane / 8 % 2 * kPieceSize);
#pragma unroll
  for (int k = 0; k < A::kDim; k += 2 * kPieceSize) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::ldmatrix_x4(left[m], a_pieces.at(16 * m, k));
      round_operands(left[m], type);
    }
#pragma unroll
    for (int n = 0; n < B::kRows; n += 16) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b_pieces.at(n, k));
      round_operands(right, type);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(sum[m][n / 8], left[m], right[0], right[1], type);
        mma(sum[m][n / 8 + 1], left[m], right[2], right[3], type);
      }
    }
  }
}

// sum[m] += (weights[m], rounded to the tile's type) · b's columns [column, column + kColumns).
template <int kM, int kColumns, class B>
TA_DEVICE void multiply_16bit(float (&sum)[kM][kColumns / 8][4], const float (&weights)[kM][B::kRows / 8][4], B& b,
                              int column) {
  const typename B::Element type{};
  const int lane = lane_index();
  const LanePieces<B> b_pieces(b, lane % 16, lane / 16 * kPiece<typename B::Element>);
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

// The same in TF32. mma wants of a row of weights elements t and t + 4 in lane t, whose accumulators hold 2t and
// 2t + 1; the order of a sum's terms is free, so b's rows are read in the accumulators' order. Nothing transposes
// 32-bit elements: each lane reads its own.
template <int kM, int kColumns, class B>
TA_DEVICE void multiply_tf32(float (&sum)[kM][kColumns / 8][4], const float (&weights)[kM][B::kRows / 8][4], B& b,
                             int column) {
  constexpr int kPermuted = B::kPermuted;
  static_assert(!B::kNarrow, "");
  const int group = lane_index() / 4, t = lane_index() % 4;
  // Rows 2t and 2t + 1, column `group`; their permutation is split into what changes bit 2 and what stays above it.
  const float* const even = b.element + 2 * t * B::kDim + group;
  const float* const odd = b.element + (2 * t + 1) * B::kDim + (group ^ 4);
#pragma unroll
  for (int k = 0; k < B::kRows; k += 8) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float (&w)[4] = weights[m][k / 8];
      left[m][0] = ptx::to_tf32(w[0]);
      left[m][1] = ptx::to_tf32(w[2]);
      left[m][2] = ptx::to_tf32(w[1]);
      left[m][3] = ptx::to_tf32(w[3]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 8) {
      const int c = column + n, offset = k * B::kDim + c / kPermuted * kPermuted + (c % kPermuted ^ 8 * t);
      const uint32_t b0 = ptx::to_tf32(even[offset]), b1 = ptx::to_tf32(odd[offset]);
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::mma_m16n8k8(sum[m][n / 8], left[m], b0, b1);
    }
  }
}

template <int kM, int kColumns, class B>
TA_DEVICE void multiply(float (&sum)[kM][kColumns / 8][4], const float (&weights)[kM][B::kRows / 8][4], B& b,
                        int column) {
  if constexpr (sizeof(typename B::Element) == 4)
    multiply_tf32<kM, kColumns>(sum, weights, b, column);
  else
    multiply_16bit<kM, kColumns>(sum, weights, b, column);
}

// Two neighbouring elements, stored at once.
template <class T>
TA_DEVICE void store_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = ptx::pack(x, y, T{});
}
TA_DEVICE void store_pair(float* to, float x, float y) {
  struct alignas(8) Pair {
    float x, y;
  };
  *reinterpret_cast<Pair*>(to) = {x, y};
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
        const int c = 8 * n + 2 * (lane % 4), in_piece = c % kPiece<T>;
        T* const piece = tile.piece(tile_row + 16 * m + 8 * half + lane / 4, c - in_piece);
        store_pair(piece + in_piece, sum[m][n][2 * half] * factor[m][half], sum[m][n][2 * half + 1] * factor[m][half]);
      }
  __syncwarp();
  constexpr int kPieces = kColumns / kPiece<T>;
#pragma unroll
  for (int i = lane; i < 16 * kM * kPieces; i += 32) {
    const int r = i / kPieces, c = i % kPieces * kPiece<T>;
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
