// The products of matrix_product.h on AMX, by six products of float32's three pieces (pieces.h). Included by
// instantiate/product_amx.cpp.
//
// A task has a block of rows, whose pieces lie in the L2 cache, and walks over panels of columns: a panel is split, and
// multiplied with the block's panels one after the other. Sums over more than kDepth numbers are made of several parts,
// which are added in out; each part starts from zero, which keeps errors small.
#pragma once

#include "../matrix_product.h"
#include "../tasks.h"
#include "split_operands.h"
#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A panel is two tiles of rows or columns, and a square as much of it as one tile depth takes.
constexpr int64_t kProductPanel = 2 * kTileSide;
constexpr int64_t kSquarePieceBytes = kProductPanel * kTileDepth * 2;
constexpr int64_t kSquareBytes = kPiecesOf<float> * kSquarePieceBytes;

// 768 KiB of pieces. 12 and 16 panels take 5 to 20 % longer than 8, for all that L2 has 2 MiB; 6 panels up to 5 %, 384
// and 256 numbers up to 8 % (but for sums of exactly 768).
constexpr int64_t kMostPanels = 8, kDepth = 512;
constexpr int64_t kFewestPanels = 4;

// What a product will read next, asked for beside it: the pieces of the next tile depth, which come from L2, whose
// latency took a tenth to a sixth of the time; out's block, and some of the right operand's next panel, from memory.
class PiecesAhead {
 public:
  // next: lines of kProductPanel numbers.
  PiecesAhead(const TileOperand& left, const TileOperand& right, const float* next, int64_t next_stride,
              const float* out, int64_t out_stride)
      : left_(left.tile(1, 0)),
        right_(right.tile(1, 0)),
        next_(next),
        out_(out),
        next_stride_(next_stride),
        out_stride_(out_stride) {}

  static constexpr int kNextLines = 4, kOutLines = 2;  // of each tile depth

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    constexpr int kLines = kSquareBytes / 64;
    constexpr int begin = parts_before(kSlot, kSlots, kLines), end = parts_before(kSlot + 1, kSlots, kLines);
#pragma GCC unroll 8
    for (int i = begin; i < end; ++i) {
      __builtin_prefetch(left_ + i * 64, kRead, kIntoL1);
      __builtin_prefetch(right_ + i * 64, kRead, kIntoL1);
    }
    if constexpr (parts_before(kSlot, kSlots, kOutLines) < parts_before(kSlot + 1, kSlots, kOutLines)) {
      __builtin_prefetch(out_, kWrite, kIntoL1);
      __builtin_prefetch(out_ + kTileSide, kWrite, kIntoL1);
      out_ += out_stride_;
    }
    if constexpr (parts_before(kSlot, kSlots, kNextLines) < parts_before(kSlot + 1, kSlots, kNextLines)) {
      __builtin_prefetch(next_, kRead, kIntoL2);
      __builtin_prefetch(next_ + kTileSide, kRead, kIntoL2);
      next_ += next_stride_;
    }
    if constexpr (kSlot == kSlots - 1) left_ += kSquareBytes, right_ += kSquareBytes;
  }

 private:
  static constexpr int kRead = 0, kWrite = 1, kIntoL1 = 3, kIntoL2 = 2;  // __builtin_prefetch's arguments

  const char *left_, *right_;
  const float *next_, *out_;
  int64_t next_stride_, out_stride_;
};

// One side of a product: rows or columns in panels.
class ProductSide {
 public:
  ProductSide(const Matrix& matrix, int64_t count) : matrix_(matrix), count_(count) {}

  int64_t panels() const { return (count_ + kProductPanel - 1) / kProductPanel; }
  int64_t count_in(int64_t panel) const { return smaller(kProductPanel, count_ - panel * kProductPanel); }

  // The pieces of numbers [begin, begin + depth) of a panel's sums, at most kTileDepth: A's operand, or B's.
  template <bool kLeft>
  TA_INLINE void split(int64_t panel, int64_t begin, int64_t depth, uint16_t* out, bool* infinite) const {
    constexpr int64_t kPieceStride = kSquarePieceBytes / 2;
    const int64_t first = panel * kProductPanel, count = count_in(panel);
    TensorView view;
    view.data = const_cast<float*>(matrix_.along_depth ? line(first) + begin : line(begin) + first);
    view.stride[2] = matrix_.stride;
    if (matrix_.along_depth) {
      SplitSource<float> source(view, 0, 0, 0, count, depth, kProductPanel, kTileDepth, out, infinite);
      kLeft ? void(source.by_rows()) : source.lanes(out, kPieceStride, 0, kProductPanel);
    } else {
      SplitSource<float> source(view, 0, 0, 0, depth, count, kTileDepth, kProductPanel, out, infinite);
      kLeft ? void(source.by_columns(out, nullptr)) : source.template row_pairs<1>(out, kPieceStride);
    }
  }

  // Where PiecesAhead looks for a share of the next panel's numbers from `begin` on. Lines along the sums are long, and
  // the processor asks for them by itself.
  const float* share(int64_t panel, int64_t begin, int64_t line_number) const {
    if (matrix_.along_depth) return matrix_.data;
    return line(begin + line_number) + smaller(panel + 1, panels() - 1) * kProductPanel;
  }
  int64_t share_stride() const { return matrix_.along_depth ? 0 : matrix_.stride; }

 private:
  const float* line(int64_t number) const { return matrix_.data + number * matrix_.stride; }

  const Matrix& matrix_;
  int64_t count_;
};

class MatrixMultiplication {
 public:
  MatrixMultiplication(const MatrixProduct& product, int64_t threads, bool* infinite)
      : p_(product), left_(product.left, product.rows), right_(product.right, product.columns), infinite_(infinite) {
    // Blocks of equal size, as many for each thread; few rows are shared out by columns as well.
    const int64_t panels = left_.panels(), fewest = (panels + kMostPanels - 1) / kMostPanels;
    const int64_t blocks = (fewest + threads - 1) / threads * threads;
    block_panels_ = larger(smaller(kFewestPanels, panels), (panels + blocks - 1) / blocks);
    blocks_ = (panels + block_panels_ - 1) / block_panels_;
    groups_ = smaller(right_.panels(), (threads + blocks_ - 1) / blocks_);
  }

  int64_t items() const { return blocks_ * groups_; }

  void run(int64_t item, Scratch& scratch) const {
    const int64_t first = item % blocks_ * block_panels_, last = smaller(first + block_panels_, left_.panels());
    const int64_t group = item / blocks_;
    const int64_t begin = right_.panels() * group / groups_, end = right_.panels() * (group + 1) / groups_;
    const int64_t panel_size = (smaller(kDepth, p_.depth) + kTileDepth - 1) / kTileDepth * (kSquareBytes / 2);
    uint16_t* left = scratch.take<uint16_t>((last - first) * panel_size);
    uint16_t* right = scratch.take<uint16_t>(panel_size);
    const TileSession tiles;
    for (int64_t from = 0; from < p_.depth; from += kDepth) {
      const int64_t depth = smaller(kDepth, p_.depth - from);
      split_panels<true>(left_, first, last, from, depth, panel_size, left);
      for (int64_t column = begin; column < end; ++column) {
        split_panels<false>(right_, column, column + 1, from, depth, panel_size, right);
        for (int64_t row = first; row < last; ++row)
          multiply(row, row - first, left + (row - first) * panel_size, column, right, from, depth);
      }
    }
  }

 private:
  // Depth first, so that lines across the sums are read as they lie.
  template <bool kLeft>
  TA_NOINLINE void split_panels(const ProductSide& side, int64_t first, int64_t last, int64_t from, int64_t depth,
                                int64_t panel_size, uint16_t* out) const {
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      for (int64_t panel = first; panel < last; ++panel) {
        uint16_t* square = out + (panel - first) * panel_size + k / kTileDepth * (kSquareBytes / 2);
        side.split<kLeft>(panel, from + k, smaller(kTileDepth, depth - k), square, infinite_);
      }
    }
  }

  // number: how many panels of the block have been multiplied with this column.
  TA_NOINLINE void multiply(int64_t row, int64_t number, const uint16_t* left, int64_t column, const uint16_t* right,
                            int64_t from, int64_t depth) const {
    alignas(64) float sums[kProductPanel * kProductPanel];
    const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
    const TileOperand a{left, kTileDepth * 2, kSquareBytes, kSquarePieceBytes};
    const TileOperand b{right, kProductPanel * 4, kSquareBytes, kSquarePieceBytes};
    float* out = p_.out + row * kProductPanel * p_.columns + column * kProductPanel;
    const int64_t asked = smaller(number * steps * PiecesAhead::kNextLines, depth - 1);
    PiecesAhead ahead(a, b, right_.share(column, from, asked), right_.share_stride(), out, p_.columns);
    tile_product_beside<false, kSums<float>>(2, 2, steps, a, b, sums, kProductPanel, ahead);
    const float* bias = p_.bias == nullptr ? nullptr : p_.bias + column * kProductPanel;
    store_sums(out, left_.count_in(row), right_.count_in(column), sums, from > 0 ? out : bias,
               from > 0 ? p_.columns : 0);
  }

  // out = sums + added, whose rows are added_stride apart; null: nothing is.
  TA_INLINE void store_sums(float* out, int64_t rows, int64_t columns, const float* sums, const float* added,
                            int64_t added_stride) const {
    for (int64_t j = 0; j < columns; j += kLanes<float>) {
      const auto lanes = static_cast<__mmask16>((1u << smaller<int64_t>(columns - j, kLanes<float>)) - 1);
      for (int64_t i = 0; i < rows; ++i) {
        __m512 sum = (__m512)load(sums + i * kProductPanel + j);
        if (added != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, added + i * added_stride + j));
        _mm512_mask_storeu_ps(out + i * p_.columns + j, lanes, sum);
      }
    }
  }

  const MatrixProduct& p_;
  ProductSide left_, right_;
  int64_t block_panels_ = 0, blocks_ = 0, groups_ = 0;
  bool* infinite_;
};

inline bool multiply_matrices(const MatrixProduct& product, const Parallel& parallel) {
  bool infinite = false;
  const MatrixMultiplication multiplication(product, larger(parallel.threads, 1), &infinite);
  for_each_item(parallel, multiplication.items(),
                [&](int64_t item, Scratch& scratch) { multiplication.run(item, scratch); });
  return !infinite;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
