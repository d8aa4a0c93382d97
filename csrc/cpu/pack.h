// Moves blocks of rows between tensors and the kernels' own layouts: rows of accumulator type, and panels, which are
// transposed so that neighbouring lanes hold neighbouring rows. Included by forward.h and backward.h.
#pragma once

#include "convert.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// A matrix of accumulator type with column stride 1.
template <class Real>
struct Rows {
  const Real* data;
  int64_t stride;
};

// Converts rows × columns elements into out, whose rows are out_stride ≥ columns apart; the gap is filled with zeros.
template <class Real>
TA_INLINE void load_rows(Real* out, int64_t out_stride, const TensorView& view, const char* first, int64_t rows,
                         int64_t columns) {
  const int64_t step = view.stride[2] * element_size(view.dtype);
  for (int64_t i = 0; i < rows; ++i) {
    load_row(out + i * out_stride, view.dtype, first + i * step, 1, columns);
    for (int64_t j = columns; j < out_stride; ++j) out[i * out_stride + j] = 0;
  }
}

template <class Real>
constexpr ScalarType kStoredAs = sizeof(Real) == 8 ? ScalarType::kFloat64 : ScalarType::kFloat32;

// Query-side rows [row, row + rows) of one head, readable in whole vectors: in place where their type and width allow
// it, else converted into scratch (rows × round_up(columns, lanes), padded with zeros).
template <class Real>
TA_INLINE Rows<Real> padded_rows(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                                 int64_t columns, Real* scratch) {
  const char* first = element(view, batch, head, row);
  if (view.dtype == kStoredAs<Real> && columns % kLanes<Real> == 0) {
    return {reinterpret_cast<const Real*>(first), view.stride[2]};
  }
  const int64_t stride = round_up(columns, kLanes<Real>);
  load_rows(scratch, stride, view, first, rows, columns);
  return {scratch, stride};
}

// Key-side rows [row, row + rows) of one head, in place where the type and layout allow it and else converted into
// scratch (rows × columns). Rows far apart are copied as well: at strides like 2 KiB a block's rows share few cache
// sets. The copy is cheap beside the block's products, which read each element once per query row; with few rows it is
// not.
template <class Real>
TA_INLINE Rows<Real> key_value_rows(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                                    int64_t columns, bool few_queries, Real* scratch) {
  if (view.dtype == kStoredAs<Real> && (few_queries || view.stride[2] == columns) && is_one_run(view, row, rows)) {
    return {reinterpret_cast<const Real*>(element(view, batch, head, row)), view.stride[2]};
  }
  for_each_run(view, batch, head, row, rows, [&](const char* first, int64_t i, int64_t count) TA_INLINE_LAMBDA {
    load_rows(scratch + i * columns, columns, view, first, count, columns);
  });
  return {scratch, columns};
}

// Asks for rows that are about to be read out of order.
template <class Real>
TA_INLINE void prefetch_rows(Rows<Real> rows, int64_t first, int64_t count, int64_t columns) {
  for (int64_t i = first; i < first + count; ++i) {
    const char* row = reinterpret_cast<const char*>(rows.data + i * rows.stride);
    for (int64_t j = 0; j < columns * static_cast<int64_t>(sizeof(Real)); j += 64) __builtin_prefetch(row + j, 0, 2);
  }
}

// Rows that will be read soon, which the L2 cache is asked for in portions between the products' register tiles: in one
// burst they would wait for memory, and the products after them.
class RowsAhead {
 public:
  // So many bytes from the start of each of so many rows, step bytes apart.
  TA_INLINE void add(const char* first, int64_t step, int64_t bytes, int64_t rows) {
    if (rows <= 0) return;
    regions_[count_++] = {first, step, bytes, rows};
    rows_ += rows;
  }
  TA_INLINE void divide(int64_t portions) { portion_ = (rows_ + portions - 1) / larger<int64_t>(portions, 1); }
  TA_INLINE void ask_for_portion() { ask_for(portion_); }
  TA_INLINE void ask_for_rest() { ask_for(rows_); }

 private:
  struct Region {
    const char* row;
    int64_t step, bytes, rows;
  };

  TA_INLINE void ask_for(int64_t rows) {
    constexpr int kIntoL2 = 2;  // __builtin_prefetch's locality
    while (rows > 0 && now_ < count_) {
      Region& region = regions_[now_];
      const int64_t count = smaller(rows, region.rows);
      const char* row = region.row;
      for (int64_t i = 0; i < count; ++i, row += region.step) {
        for (int64_t j = 0; j < region.bytes; j += 64) __builtin_prefetch(row + j, 0, kIntoL2);
      }
      region.row = row;
      region.rows -= count;
      rows -= count;
      rows_ -= count;
      if (region.rows == 0) ++now_;
    }
  }

  Region regions_[5];
  int count_ = 0, now_ = 0;
  int64_t rows_ = 0, portion_ = 0;
};

// Rows of a tensor, of which RowsAhead gets equal shares, one after the other.
struct RowShares {
  const char* first = nullptr;
  int64_t step, bytes, rows = 0;  // from row to row, of a row, and how many
  int64_t share_size;             // rows · kUnit
  static constexpr int64_t kUnit = 1 << 20;

  // Rows that cross a page are not asked for.
  static TA_INLINE RowShares of(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                                int64_t columns, int64_t shares) {
    const int64_t size = element_size(view.dtype);
    if (rows <= 0 || shares <= 0 || !is_one_run(view, row, rows)) return {};
    const int64_t share_size = (rows * kUnit + shares - 1) / shares;
    return {element(view, batch, head, row), view.stride[2] * size, columns * size, rows, share_size};
  }
  TA_INLINE void add_share(int64_t share, RowsAhead& ahead) const {
    if (rows == 0) return;
    const int64_t begin = share * share_size / kUnit, end = smaller(rows, (share + 1) * share_size / kUnit);
    ahead.add(first + begin * step, step, bytes, end - begin);
  }
};

// The block of keys and values after this one, of which each panel asks for a share: rows that come from further away
// than the L2 cache would arrive too late for that block's first panel.
struct NextRows {
  RowShares keys, values;

  // The block that starts at row; left: how many rows there are from it on.
  NextRows(const AttentionProblem& p, int64_t batch, int64_t kv_head, int64_t row, int64_t block, int64_t left,
           int64_t panels)
      : keys(RowShares::of(p.key, batch, kv_head, row, smaller(block, left), p.head_dim, panels)),
        values(RowShares::of(p.value, batch, kv_head, row, smaller(block, left), p.value_dim, panels)) {}

  TA_INLINE void add_share(int64_t share, RowsAhead& ahead) const {
    keys.add_share(share, ahead);
    values.add_share(share, ahead);
  }
  TA_INLINE void prefetch(int64_t share) const {
    RowsAhead ahead;
    add_share(share, ahead);
    ahead.ask_for_rest();
  }
};

// panel[j · width + i] = in[i · in_stride + j] for i < rows and j < columns; the lanes from rows to width are zero.
// Reads in up to a multiple of the vector length beyond columns: in must be padded so.
template <class Real>
TA_NOINLINE void pack_panel(Real* panel, int64_t width, const Real* in, int64_t in_stride, int64_t rows,
                            int64_t columns) {
  constexpr int n = kLanes<Real>;
  for (int64_t i0 = 0; i0 < width; i0 += n) {
    for (int64_t j0 = 0; j0 < columns; j0 += n) {
      Vec<Real> tile[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) tile[i] = i0 + i < rows ? load(in + (i0 + i) * in_stride + j0) : Vec<Real>{};
      transpose_in_registers<Real>(tile);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) {
        if (j0 + j < columns) store(panel + (j0 + j) * width + i0, tile[j]);
      }
    }
  }
}

// One tile of unpack_panel, as many rows and columns as a vector has lanes; or, unless kWhole, the first of them.
template <bool kWhole, class Real>
TA_INLINE void unpack_tile(Real* out, int64_t out_stride, const Real* panel, int64_t width, Vec<Real> multiplier,
                           int64_t rows, int64_t columns) {
  constexpr int n = kLanes<Real>;
  Vec<Real> tile[n];
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) tile[j] = kWhole || j < columns ? load(panel + j * width) * multiplier : Vec<Real>{};
  transpose_in_registers<Real>(tile);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (kWhole || i < rows) store(out + i * out_stride, tile[i]);
  }
}

// The inverse, for whole vectors of columns: out[i · out_stride + j] = panel[j · width + i] · factor[i] for i < rows.
template <class Real>
TA_NOINLINE void unpack_panel(Real* out, int64_t out_stride, const Real* panel, int64_t width, const Real* factor,
                              int64_t rows, int64_t columns) {
  constexpr int n = kLanes<Real>;
  for (int64_t i = 0; i < rows; i += n) {
    const Vec<Real> multiplier = load(factor + i);
    for (int64_t j = 0; j < columns; j += n) {
      Real* place = out + i * out_stride + j;
      const Real* tile = panel + j * width + i;
      if (rows - i >= n && columns - j >= n) {
        unpack_tile<true>(place, out_stride, tile, width, multiplier, n, n);
      } else {
        unpack_tile<false>(place, out_stride, tile, width, multiplier, rows - i, columns - j);
      }
    }
  }
}

template <class Real>
TA_INLINE void store_rows(const TensorView& view, char* first, const Real* in, int64_t in_stride, int64_t rows,
                          int64_t columns) {
  const int64_t step = view.stride[2] * element_size(view.dtype);
  for (int64_t i = 0; i < rows; ++i) store_row(first + i * step, view.dtype, in + i * in_stride, columns);
}

// Writes a panel's rows, times factor[row], to a tensor. scratch holds rows × round_up(columns, lanes).
template <class Real>
TA_INLINE void store_panel(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t rows,
                           int64_t columns, const Real* panel, int64_t width, const Real* factor, Real* scratch) {
  char* first = element(view, batch, head, row);
  if (view.dtype == kStoredAs<Real> && columns % kLanes<Real> == 0) {
    unpack_panel(reinterpret_cast<Real*>(first), view.stride[2], panel, width, factor, rows, columns);
    return;
  }
  const int64_t stride = round_up(columns, kLanes<Real>);
  unpack_panel(scratch, stride, panel, width, factor, rows, columns);
  store_rows(view, first, scratch, stride, rows, columns);
}

template <class Real>
TA_INLINE void fill(Real* out, Real value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
