// Reading, adding to and multiplying with the rows that a selection has chosen: O(length · count · columns). Every tier
// uses these kernels.
#pragma once

#include "../../core/selection.h"
#include "../launch.h"
#include "../row_statistics.cuh"
#include "tile.cuh"

namespace torch_attn::cuda::simt {

template <class T>
TA_DEVICE T* row_of(const TensorView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}

template <class Real>
TA_DEVICE Real weight_of(const RowChoice& c, int64_t choice) {
  return c.weights ? static_cast<const Real*>(c.weights)[choice] : Real(1);
}

constexpr int kRowsPerBlock = kThreads / 32;  // of gather and dots: a warp for each row

// The row of a query head that a warp works on.
struct ChoosingRow {
  int64_t batch, head, row, choices;  // choices: where the row's are
  bool exists;

  TA_DEVICE explicit ChoosingRow(const RowChoice& c) {
    const int64_t index = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
    exists = index < c.batch * c.heads * c.length;
    row = index % c.length;
    head = index / c.length % c.heads;
    batch = index / c.length / c.heads;
    choices = index * c.count;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const __grid_constant__ RowChoice c, const __grid_constant__ TensorView source,
                       const __grid_constant__ TensorView out) {
  using Real = Accumulator<T>;
  const ChoosingRow r(c);
  if (!r.exists) return;
  for (int64_t column = threadIdx.x % 32; column < c.columns; column += 32) {
    Real sum = 0;
    for (int64_t i = r.choices; i < r.choices + c.count; ++i) {
      const int64_t place = c.indices[i];
      if (place >= 0 && place < c.source_length)
        sum += weight_of<Real>(c, i) *
               load(row_of<const T>(source, r.batch, r.head / (c.heads / c.kv_heads), place) + column);
    }
    store(row_of<T>(out, r.batch, r.head, r.row) + column, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    chosen_dots_kernel(const __grid_constant__ RowChoice c, const __grid_constant__ TensorView rows,
                       const __grid_constant__ TensorView source, Accumulator<T>* dots) {
  using Real = Accumulator<T>;
  const ChoosingRow r(c);
  if (!r.exists) return;
  const T* const left = row_of<const T>(rows, r.batch, r.head, r.row);
  for (int64_t i = r.choices; i < r.choices + c.count; ++i) {
    const int64_t place = c.indices[i];
    Real sum = 0;
    if (place >= 0 && place < c.source_length) {
      const T* const right = row_of<const T>(source, r.batch, r.head / (c.heads / c.kv_heads), place);
      for (int64_t column = threadIdx.x % 32; column < c.columns; column += 32)
        sum += load(left + column) * load(right + column);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dots[i] = sum;
  }
}

// A block owns 64 rows and 64 columns of the source and looks through all choices for them, 256 at a time, so that each
// sum has one order. A thread owns a column of every fourth row.
template <class Real>
struct ScatterShared {
  Real sums[kTile * kTile];
  int64_t rows[kThreads];  // those that made the choices
  int places[kThreads];    // which of the block's rows a choice is; −1: none
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_kernel(const __grid_constant__ RowChoice c, const __grid_constant__ TensorView rows,
                        const __grid_constant__ TensorView out) {
  using Real = Accumulator<T>;
  constexpr int kOwners = kThreads / kTile;  // of a column
  TA_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ScatterShared<Real>*>(memory);
  const int64_t chunks = ceil_div(c.columns, kTile), tiles = ceil_div(c.source_length, kTile);
  int64_t index = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), owner = thread / kTile;
  const int64_t column = index % chunks * kTile + thread % kTile;
  index /= chunks;
  const int64_t first = index % tiles * kTile;
  index /= tiles;
  const int64_t kv_head = index % c.kv_heads, batch = index / c.kv_heads, group = c.heads / c.kv_heads;
  const bool has_column = column < c.columns;
  const int64_t row_step = kThreads / c.count, place_step = kThreads % c.count;

  Real* const sums = shared.sums + thread % kTile;
  for (int place = owner; place < kTile; place += kOwners) sums[place * kTile] = 0;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t of_head = (batch * c.heads + head) * c.length * c.count;
    int64_t row = thread / c.count, place_in_row = thread % c.count;  // of the choice that this thread looks at
    for (int64_t begin = 0; begin < c.length * c.count; begin += kThreads) {
      int64_t mine = -1;
      const int64_t choice = begin + thread;
      if (choice < c.length * c.count) mine = c.indices[of_head + choice] - first;
      __syncthreads();  // the last places are read no more
      shared.places[thread] = mine >= 0 && mine < kTile && first + mine < c.source_length ? static_cast<int>(mine) : -1;
      shared.rows[thread] = row;
      __syncthreads();
      row += row_step, place_in_row += place_step;
      if (place_in_row >= c.count) ++row, place_in_row -= c.count;
      for (int i = 0; i < kThreads; i += 4) {
        int place[4];
        const Bits128 bits = *reinterpret_cast<const Bits128*>(shared.places + i);
        memcpy(place, &bits, sizeof(place));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (place[e] < 0 || place[e] % kOwners != owner || !has_column) continue;
          sums[place[e] * kTile] += weight_of<Real>(c, of_head + begin + i + e) *
                                    load(row_of<const T>(rows, batch, head, shared.rows[i + e]) + column);
        }
      }
    }
  }
  if (!has_column) return;
  for (int place = owner; place < kTile && first + place < c.source_length; place += kOwners)
    store(row_of<T>(out, batch, kv_head, first + place) + column, sums[place * kTile]);
}

template <class T>
void gather_rows(const RowChoice& c, const TensorView& source, const TensorView& out, const Stream& stream) {
  launch(gather_rows_kernel<T>, (c.batch * c.heads * c.length + kRowsPerBlock - 1) / kRowsPerBlock, kThreads, 0, stream,
         c, source, out);
}

template <class T>
void chosen_dots(const RowChoice& c, const TensorView& rows, const TensorView& source, void* dots,
                 const Stream& stream) {
  launch(chosen_dots_kernel<T>, (c.batch * c.heads * c.length + kRowsPerBlock - 1) / kRowsPerBlock, kThreads, 0, stream,
         c, rows, source, static_cast<Accumulator<T>*>(dots));
}

template <class T>
void scatter_rows(const RowChoice& c, const TensorView& rows, const TensorView& out, const Stream& stream) {
  const int64_t chunks = (c.columns + kTile - 1) / kTile, tiles = (c.source_length + kTile - 1) / kTile;
  launch(scatter_rows_kernel<T>, c.batch * c.kv_heads * tiles * chunks, kThreads, sizeof(ScatterShared<Accumulator<T>>),
         stream, c, rows, out);
}

}  // namespace torch_attn::cuda::simt
