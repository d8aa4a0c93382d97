// The products of matrix_product.h on AMX, by six products of float32's three pieces (pieces.h). Included by
// instantiate/product_amx.cpp.
//
// A task has a block of rows, whose pieces lie in the L2 cache, and walks over panels of columns: a panel is multiplied
// with the block's panels one after the other, and beside these products the next one is split. Sums over more than
// kDepth numbers are made of several parts, which are added in out; each part starts from zero, which keeps errors
// small.
#pragma once

#include <utility>

#include "../matrix_product.h"
#include "../tasks.h"
#include "split_operands.h"
#include "tiles.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A panel is two tiles of rows or columns, and a square as much of it as one tile depth takes.
constexpr int64_t kProductPanel = 2 * kTileSide;
constexpr int64_t kSquarePieceBytes = kProductPanel * kTileDepth * 2;
constexpr int64_t kSquareBytes = kPiecesOf<float> * kSquarePieceBytes;

// 768 KiB of pieces. 12 panels: 0.98 to 1.03 times the speed, but for weights' gradients 0.87 to 0.97; 4 to 6: 0.9
// to 1.03. 384 numbers: 0.88 to 1.02, 256: 0.86 to 0.97.
constexpr int64_t kMostPanels = 8, kDepth = 512;
constexpr int64_t kFewestPanels = 4;

// What a product will read next, asked for beside it: the pieces of the next tile depth, which come from L2, whose
// latency took a tenth to a sixth of the time; out's block, and some of the right operand's next panel, from memory.
class PiecesAhead {
 public:
  // next: lines of kProductPanel numbers.
  PiecesAhead(const TileOperand& left, const TileOperand& right, const float* next, int64_t next_stride,
              const float* out, int64_t out_stride)
      : left_(left.from_depth(kTileDepth)),
        right_(right.from_depth(kTileDepth)),
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
      constexpr int kOfPiece = kSquarePieceBytes / 64;
      __builtin_prefetch(left_.tile(0, i % kOfPiece * 64, i / kOfPiece), kRead, kIntoL1);
      __builtin_prefetch(right_.tile(0, i % kOfPiece * 64, i / kOfPiece), kRead, kIntoL1);
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
    if constexpr (kSlot == kSlots - 1) left_ = left_.from_depth(kTileDepth), right_ = right_.from_depth(kTileDepth);
  }

 private:
  static constexpr int kRead = 0, kWrite = 1, kIntoL1 = 3, kIntoL2 = 2;  // __builtin_prefetch's arguments

  TileOperand left_, right_;
  const float *next_, *out_;
  int64_t next_stride_, out_stride_;
};

// One of the kShares parts in which the right operand's next panel is split beside products, as SplitSource would: of
// each tile depth a square of 16 numbers, transposed, or eight lines of pairs.
template <bool kAlongDepth>
class PanelShare {
 public:
  static constexpr int64_t kShares = 4;

  // The panel's first number, its lines' stride, its tile depths, and where its pieces go.
  PanelShare(int64_t number, const float* in, int64_t stride, int64_t steps, uint16_t* out)
      : in_(in), out_(out), stride_(stride), piece_stride_(steps * (kSquarePieceBytes / 2)) {
    if constexpr (kAlongDepth) {  // half of the sums' numbers, of half of the lines
      in_ += number / 2 * kTileSide * stride + number % 2 * steps * kTileSide;
      out_ += number / 2 * kTileDepth + number % 2 * steps * kTileSide * kProductPanel;
    } else {
      in_ += number * steps * (kTileDepth / kShares) * stride;
      out_ += number * steps * (kTileDepth / kShares) * kProductPanel;
    }
  }

  template <int kSlot, int kSlots>
  TA_INLINE void slot() {
    constexpr int n = kLanes<float>, kLines = 8;
    if constexpr (kAlongDepth && kSlot == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square_[i] = load(in_ + i * stride_);
      transpose_in_registers<float>(square_);
    }
    constexpr int line = parts_before(kSlot, kSlots, kLines);
    if constexpr (line < parts_before(kSlot + 1, kSlots, kLines)) {
      if constexpr (kAlongDepth) {
        store_line(out_ + line * 2 * kProductPanel, square_[2 * line], square_[2 * line + 1]);
      } else {
        const float* pair = in_ + line / 2 * 2 * stride_ + line % 2 * n;
        store_line(out_ + line / 2 * 2 * kProductPanel + line % 2 * 2 * n, load(pair), load(pair + stride_));
      }
    }
    if constexpr (kSlot == kSlots - 1) {
      in_ += kAlongDepth ? n : kTileDepth / kShares * stride_;
      out_ += (kAlongDepth ? n : kTileDepth / kShares) * kProductPanel;
    }
  }

  bool found_infinite() const { return infinite_lanes_ != 0; }

 private:
  TA_INLINE void store_line(uint16_t* out, Vec<float> first, Vec<float> second) {
    infinite_lanes_ |= infinite_lanes(first) | infinite_lanes(second);
    store_pairs<float>(out, piece_stride_, first, second);
  }

  const float* in_;
  uint16_t* out_;
  int64_t stride_, piece_stride_;
  unsigned infinite_lanes_ = 0;
  Vec<float> square_[kAlongDepth ? kLanes<float> : 1];
};

// One side of a product: rows or columns in panels.
class ProductSide {
 public:
  ProductSide(const Matrix& matrix, int64_t count) : matrix_(matrix), count_(count) {}

  int64_t panels() const { return (count_ + kProductPanel - 1) / kProductPanel; }
  int64_t count_in(int64_t panel) const { return smaller(kProductPanel, count_ - panel * kProductPanel); }

  bool along_depth() const { return matrix_.along_depth; }
  int64_t stride() const { return matrix_.stride; }

  // Number `begin` of a panel's first sum.
  const float* first_of(int64_t panel, int64_t begin) const {
    const int64_t first = panel * kProductPanel;
    return matrix_.along_depth ? line(first) + begin : line(begin) + first;
  }

  // Numbers [begin, begin + depth) of the sums of panels [first, last) in pieces, as A's operand. Memory is read as it
  // lies: panel by panel or, where lines lead across the sums, all panels of one tile depth after the other.
  TA_INLINE TileOperand split_rows(int64_t first, int64_t last, int64_t begin, int64_t depth, int64_t steps,
                                   uint16_t* out, bool* infinite) const {
    const int64_t panels = last - first;
    if (matrix_.along_depth) {
      TileOperand operand{};
      for (int64_t panel = first; panel < last; ++panel) {
        const TensorView view = view_from(panel, begin);
        uint16_t* place = out + (panel - first) * steps * (kSquareBytes / 2);
        operand = SplitSource<float>(view, 0, 0, 0, count_in(panel), depth, kProductPanel, steps * kTileDepth, place,
                                     infinite)
                      .by_rows();
      }
      return {out, operand.row_bytes, operand.step_bytes, operand.piece_bytes};
    }
    const int64_t columns = smaller(panels * kProductPanel, count_ - first * kProductPanel);
    for (int64_t step = 0; step < steps; ++step) {
      const TensorView view = view_from(first, begin + step * kTileDepth);
      uint16_t* place = out + step * panels * (kSquareBytes / 2);
      SplitSource<float>(view, 0, 0, 0, smaller(kTileDepth, depth - step * kTileDepth), columns, kTileDepth,
                         panels * kProductPanel, place, infinite)
          .by_columns(place, nullptr);
    }
    return {out, kTileDepth * 2, panels * kSquareBytes, panels * kSquarePieceBytes};
  }
  // How far apart, in bytes, panels are in it.
  int64_t panel_bytes(int64_t steps) const { return matrix_.along_depth ? steps * kSquareBytes : kSquarePieceBytes; }

  // The same of one panel, as B's operand: one piece after the other.
  TA_NOINLINE void split_columns(int64_t panel, int64_t begin, int64_t depth, int64_t steps, uint16_t* out,
                                 bool* infinite) const {
    const int64_t count = count_in(panel), piece_stride = steps * (kSquarePieceBytes / 2);
    const TensorView view = view_from(panel, begin);
    if (matrix_.along_depth) {
      SplitSource<float>(view, 0, 0, 0, count, depth, kProductPanel, steps * kTileDepth, out, infinite)
          .lanes(out, piece_stride, 0, kProductPanel);
    } else {
      SplitSource<float>(view, 0, 0, 0, depth, count, steps * kTileDepth, kProductPanel, out, infinite)
          .template row_pairs<1>(out, piece_stride);
    }
  }

  // Where PiecesAhead looks for a share of a panel's numbers from `begin` on. Lines along the sums are long, and
  // the processor asks for them by itself.
  const float* share(int64_t panel, int64_t begin, int64_t line_number) const {
    if (matrix_.along_depth) return matrix_.data;
    return line(begin + line_number) + smaller(panel, panels() - 1) * kProductPanel;
  }
  int64_t share_stride() const { return matrix_.along_depth ? 0 : matrix_.stride; }

 private:
  TensorView view_from(int64_t panel, int64_t begin) const {
    TensorView view;
    view.data = const_cast<float*>(first_of(panel, begin));
    view.stride[2] = matrix_.stride;
    return view;
  }
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
    const int64_t panel_size = tile_depths(smaller(kDepth, p_.depth)) * (kSquareBytes / 2);
    uint16_t* left = scratch.take<uint16_t>((last - first) * panel_size);
    uint16_t* right[2] = {scratch.take<uint16_t>(panel_size), scratch.take<uint16_t>(panel_size)};  // now, next
    const TileSession tiles;
    for (int64_t from = 0; from < p_.depth; from += kDepth) {
      const int64_t depth = smaller(kDepth, p_.depth - from), steps = tile_depths(depth);
      const Part part{from, depth, steps, left_.split_rows(first, last, from, depth, steps, left, infinite_)};
      right_.split_columns(begin, from, depth, steps, right[0], infinite_);
      for (int64_t column = begin; column < end; ++column) {
        const bool has_next = column + 1 < end;
        const bool beside = has_next && right_.count_in(column + 1) == kProductPanel && depth % kTileDepth == 0 &&
                            last - first >= PanelShare<true>::kShares;
        const Pair pair{column, right[0], beside ? right[1] : nullptr};
        for (int64_t row = first; row < last; ++row) multiply(row, row - first, pair, part);
        if (has_next && !beside) right_.split_columns(column + 1, from, depth, steps, right[1], infinite_);
        std::swap(right[0], right[1]);
      }
    }
  }

 private:
  // Numbers [from, from + depth) of the sums, and the block's rows of them.
  struct Part {
    int64_t from, depth, steps;
    TileOperand rows;
  };
  // A panel of columns, its pieces, and where those of the next are made beside products; null: they are not.
  struct Pair {
    int64_t column;
    const uint16_t* pieces;
    uint16_t* next;
  };
  static int64_t tile_depths(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

  // number: how many panels of the block have been multiplied with this column.
  TA_NOINLINE void multiply(int64_t row, int64_t number, const Pair& pair, const Part& part) const {
    alignas(64) float sums[kProductPanel * kProductPanel];
    WaitingSums waiting;
    const int64_t steps = part.steps, column = pair.column;
    const TileOperand a = part.rows.moved(number * left_.panel_bytes(steps));
    const TileOperand b{pair.pieces, kProductPanel * 4, kSquarePieceBytes, steps * kSquarePieceBytes};
    float* out = p_.out + row * kProductPanel * p_.columns + column * kProductPanel;
    const int64_t asked = smaller(number * steps * PiecesAhead::kNextLines, part.depth - 1);
    PiecesAhead ahead(a, b, right_.share(column + 2, part.from, asked), right_.share_stride(), out, p_.columns);
    if (pair.next == nullptr || number >= PanelShare<true>::kShares) {
      tile_product_beside<false, kSums<float>>(2, 2, steps, a, b, sums, kProductPanel, waiting, ahead);
    } else if (right_.along_depth()) {
      multiply_and_split<true>(number, pair, part, a, b, sums, waiting, ahead);
    } else {
      multiply_and_split<false>(number, pair, part, a, b, sums, waiting, ahead);
    }
    waiting.flush();
    const float* bias = p_.bias == nullptr ? nullptr : p_.bias + column * kProductPanel;
    store_sums(out, left_.count_in(row), right_.count_in(column), sums, part.from > 0 ? out : bias,
               part.from > 0 ? p_.columns : 0);
  }

  template <bool kAlongDepth>
  TA_INLINE void multiply_and_split(int64_t share, const Pair& pair, const Part& part, const TileOperand& a,
                                    const TileOperand& b, float* sums, WaitingSums& waiting, PiecesAhead& ahead) const {
    PanelShare<kAlongDepth> next(share, right_.first_of(pair.column + 1, part.from), right_.stride(), part.steps,
                                 pair.next);
    BothBeside<PiecesAhead, PanelShare<kAlongDepth>> both{ahead, next};
    tile_product_beside<false, kSums<float>>(2, 2, part.steps, a, b, sums, kProductPanel, waiting, both);
    if (next.found_infinite()) __atomic_store_n(infinite_, true, __ATOMIC_RELAXED);
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
