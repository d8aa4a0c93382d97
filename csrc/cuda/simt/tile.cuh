// The two matrix products that attention is made of, on 64 x 64 tiles of scores, for any type and any head dimension.
//
// A block of 16 x 16 threads owns a tile. Thread (y, x) holds rows 4y to 4y + 3 and keys x, x + 16, x + 32 and x + 48:
// rows next to each other share Philox calls where rows are keys, and keys 16 apart keep shared memory free of bank
// conflicts. Operands pass through shared memory in the accumulator's type, in stages a few columns deep, so that
// neither the head dimension nor the type limits what fits.
#pragma once

#include "../head_score.cuh"

namespace torch_attn::cuda::simt {

constexpr int kTile = 64;
constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kPerThread = kTile / kSide;

// What one instruction moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T lane[kWidth];
};

template <class T>
TA_DEVICE Vector<T> load_vector(const T* p) {  // p is 16-byte aligned
  const Bits128 bits = *reinterpret_cast<const Bits128*>(p);
  Vector<T> v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// The rows of one head of query, key, value or grad_out, from `first` on. Reading outside gives zeros.
template <class T>
struct Rows {
  using Element = T;
  const T* data;
  int64_t stride, count;
  int columns;
  bool aligned;  // whole vectors can be read

  TA_DEVICE Rows(const TensorView& view, int64_t batch, int64_t head, int64_t row_count, int64_t column_count,
                 int64_t first = 0)
      : data(static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
             first * view.stride[2]),
        stride(view.stride[2]),
        count(row_count),
        columns(static_cast<int>(column_count)),
        aligned(((reinterpret_cast<uintptr_t>(data) | stride * sizeof(T) | columns * sizeof(T)) & 15) == 0) {}

  TA_DEVICE Vector<T> vector(int64_t row, int column) const {
    return row < count ? vector_of(data + row * stride, column) : Vector<T>{};
  }

 protected:
  TA_DEVICE Vector<T> vector_of(const T* row, int column) const {
    Vector<T> v{};
    const T* p = row + column;
    if (aligned) {
      if (column < columns) v = load_vector(p);
    } else {
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e)
        if (column + e < columns) v.lane[e] = p[e];
    }
    return v;
  }
};

// Keys or values, which may lie in pages: the one place of this tier where these are looked up.
template <class T>
struct KeyRows : Rows<T> {
  const int32_t* pages;  // of the batch entry; null: not paged
  int64_t page_rows, page_stride;

  TA_DEVICE KeyRows(const TensorView& view, int64_t batch, int64_t head, int64_t row_count, int64_t column_count,
                    int64_t first)
      : Rows<T>(view, view.pages ? 0 : batch, head, row_count, column_count, first),
        pages(view.pages ? view.pages + batch * view.pages_stride : nullptr),
        page_rows(view.page_rows),
        page_stride(view.stride[0]) {
    if (pages && page_stride * sizeof(T) % 16 != 0) this->aligned = false;
  }

  TA_DEVICE Vector<T> vector(int64_t row, int column) const {
    if (!pages || row >= this->count) return Rows<T>::vector(row, column);
    const int64_t page = pages[row / page_rows];
    return this->vector_of(this->data + page * page_stride + row % page_rows * this->stride, column);
  }
};

// Copies kRows x kColumns elements from (row, column) on into shared memory, converted; `pitch` is its row length.
// Source: Rows or KeyRows.
template <int kRows, int kColumns, class Source, class Real>
TA_DEVICE void load_block(Real* block, int pitch, const Source& rows, int64_t row, int column) {
  using T = typename Source::Element;
  constexpr int kWidth = Vector<T>::kWidth, kPerRow = kColumns / kWidth;
  constexpr int kLoads = (kRows * kPerRow + kThreads - 1) / kThreads;
  constexpr bool kExact = kRows * kPerRow % kThreads == 0;
  Vector<T> loaded[kLoads];
#pragma unroll
  for (int n = 0; n < kLoads; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kThreads;
    if (kExact || i < kRows * kPerRow) loaded[n] = rows.vector(row + i / kPerRow, column + i % kPerRow * kWidth);
  }
#pragma unroll
  for (int n = 0; n < kLoads; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kThreads;
    if (!kExact && i >= kRows * kPerRow) continue;
    Real* to = block + i / kPerRow * pitch + i % kPerRow * kWidth;
#pragma unroll
    for (int e = 0; e < kWidth; e += Vector<Real>::kWidth) {
      Vector<Real> converted;
#pragma unroll
      for (int f = 0; f < Vector<Real>::kWidth; ++f) converted.lane[f] = load(&loaded[n].lane[e + f]);
      *reinterpret_cast<Vector<Real>*>(to + e) = converted;
    }
  }
}

// The block's shared memory: two operand stages, which the second product uses as one, and a tile of weights.
template <class Real, int kColumns>
struct Shared {
  static constexpr int kWidth = Vector<Real>::kWidth;
  static constexpr int kDepth = 128 / sizeof(Real);    // columns of a stage of multiply_transposed
  static constexpr int kStagePitch = kDepth + kWidth;  // an odd number of vectors: no bank conflicts
  static constexpr int kWeightPitch = kTile + kWidth;
  static constexpr int kStageRows = 32;  // rows of a stage of multiply
  static constexpr int kStageSize = 2 * kTile * kStagePitch;
  static_assert(kStageRows * kColumns <= kStageSize, "the second product's stage must fit where the first one's were");

  Real stage[kStageSize];
  Real weights[kTile * kWeightPitch];
};

TA_DEVICE int thread_x() { return static_cast<int>(threadIdx.x) % kSide; }
TA_DEVICE int thread_y() { return static_cast<int>(threadIdx.x) / kSide; }

// sum[i][j] += (row a_row + 4y + i of a) · (row b_row + x + 16j of b).
template <class A, class B, class Real, int kColumns>
TA_DEVICE void multiply_transposed(Real (&sum)[kPerThread][kPerThread], Shared<Real, kColumns>& shared, const A& a,
                                   int64_t a_row, const B& b, int64_t b_row) {
  using S = Shared<Real, kColumns>;
  Real* const a_stage = shared.stage;
  Real* const b_stage = shared.stage + kTile * S::kStagePitch;
  int column = 0;
  do {                // once even for a head dimension of 0: callers rely on the barriers
    __syncthreads();  // whoever used the stages or the weights before is done
    load_block<kTile, S::kDepth>(a_stage, S::kStagePitch, a, a_row, column);
    load_block<kTile, S::kDepth>(b_stage, S::kStagePitch, b, b_row, column);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < S::kDepth; k += S::kWidth) {
      Vector<Real> u[kPerThread], v[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        u[i] = load_vector(a_stage + (thread_y() * kPerThread + i) * S::kStagePitch + k);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) v[j] = load_vector(b_stage + (thread_x() + kSide * j) * S::kStagePitch + k);
#pragma unroll
      for (int e = 0; e < S::kWidth; ++e)
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) sum[i][j] += u[i].lane[e] * v[j].lane[e];
    }
    column += S::kDepth;
  } while (column < a.columns);
}

// Thread (y, x)'s column number c of the kColumns that multiply() computes.
template <class Real>
TA_DEVICE int column_of(int c) {
  constexpr int kWidth = Vector<Real>::kWidth;
  return thread_x() * kWidth + c / kWidth * kSide * kWidth + c % kWidth;
}

// sum[i][c] += (row 4y + i of shared.weights) · (column `column` + column_of(c) of b's 64 rows from b_row on). The
// weights may have been written just before, without a barrier.
template <class B, class Real, int kColumns>
TA_DEVICE void multiply(Real (&sum)[kPerThread][kColumns / kSide], Shared<Real, kColumns>& shared, const B& b,
                        int64_t b_row, int column) {
  using S = Shared<Real, kColumns>;
  for (int part = 0; part < kTile; part += S::kStageRows) {
    __syncthreads();
    load_block<S::kStageRows, kColumns>(shared.stage, kColumns, b, b_row + part, column);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < S::kStageRows; k += S::kWidth) {
      Vector<Real> w[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        w[i] = load_vector(shared.weights + (thread_y() * kPerThread + i) * S::kWeightPitch + part + k);
#pragma unroll
      for (int e = 0; e < S::kWidth; ++e)
#pragma unroll
        for (int c = 0; c < kColumns / kSide; c += S::kWidth) {
          const Vector<Real> v = load_vector(shared.stage + (k + e) * kColumns + column_of<Real>(c));
#pragma unroll
          for (int i = 0; i < kPerThread; ++i)
#pragma unroll
            for (int f = 0; f < S::kWidth; ++f) sum[i][c + f] += w[i].lane[e] * v.lane[f];
        }
    }
  }
}

// Over the 16 threads that share rows.
template <class Real>
TA_DEVICE Real row_sum(Real x) {
#pragma unroll
  for (int step = 1; step < kSide; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
template <class Real>
TA_DEVICE Real row_max(Real x) {
#pragma unroll
  for (int step = 1; step < kSide; step *= 2) {
    const Real other = __shfl_xor_sync(~0u, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Dropout bits of this thread's keys x + 16j, in a tile that starts at `key`, and its four rows, `row` the first: bit
// 8j + i. Eight neighbours need the same eight Philox calls: each makes one and they exchange the results.
template <class Real>
TA_DEVICE uint32_t kept_of_rows(const HeadScore<Real>& head, int64_t row, int64_t key) {
  const int x = thread_x(), group = (x & 1) * 2 + (x / 2 & 1), pair = x / 4 & 1;
  uint32_t kept = kept_of_call(head.dropout, head.dropout_head, row + 2 * pair, key + x / 8 * 8 + kSide * group);
  kept = exchange_kept<1, 16>(kept);
  kept = exchange_kept<2, 8>(kept);
  return exchange_kept<4, 2>(kept);
}

// Where rows are keys, `key` the first of the thread's four: key i in row x + 16j of the tile that starts at `row`.
// Four threads, neighbours in both directions, need the same four calls.
TA_DEVICE bool is_kept_of_key_rows(uint32_t kept, int i, int j) { return kept >> (i % 2 * 16 + i / 2 * 8 + j) & 1; }
template <class Real>
TA_DEVICE uint32_t kept_of_key_rows(const HeadScore<Real>& head, int64_t key, int64_t row) {
  const int x = thread_x(), group = thread_y() % 2 * 2 + x % 2;
  uint32_t kept = kept_of_call(head.dropout, head.dropout_head, row + x + kSide * group, key);
  kept = exchange_kept<1, 1>(kept);
  return exchange_kept<16, 2>(kept);
}

// Writes this thread's part of a 64 x kColumns result, times `factor`. `first`: the batch entry's first row.
template <class T, class Real, int kAccumulators>
TA_DEVICE void store_rows(const TensorView& view, int64_t batch, int64_t head, int64_t row, int64_t row_count,
                          int column, int64_t column_count, const Real (&sum)[kPerThread][kAccumulators],
                          const Real (&factor)[kPerThread], int64_t first = 0) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = row + thread_y() * kPerThread + i;
    if (r >= row_count) continue;
    T* const to =
        static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + (first + r) * view.stride[2];
#pragma unroll
    for (int c = 0; c < kAccumulators; ++c)
      if (column + column_of<Real>(c) < column_count) store(to + column + column_of<Real>(c), sum[i][c] * factor[i]);
  }
}

}  // namespace torch_attn::cuda::simt
