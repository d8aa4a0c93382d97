// Reading, adding to and multiplying with the rows that a selection has chosen: O(length · count · columns). Included
// by instantiate/selection_*.cpp.
#pragma once

#include "../core/selection.h"
#include "pack.h"
#include "tasks.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

template <class Real>
struct ChosenRows {
  static constexpr int64_t kRows = 64;  // of a query head, in a task of gather and dots
  const RowChoice& c;
  int64_t group, padded, row_tasks;
  int64_t source_chunks, source_chunk;  // tasks of scatter for one source head, and their rows

  ChosenRows(const RowChoice& choice, int threads)
      : c(choice),
        group(c.kv_heads == 0 ? 1 : c.heads / c.kv_heads),
        padded(round_up(c.columns, kLanes<Real>)),
        row_tasks((c.length + kRows - 1) / kRows) {
    const int64_t source_heads = larger<int64_t>(1, c.batch * c.kv_heads);
    const int64_t chunks = threads > 1 ? (2 * threads + source_heads - 1) / source_heads : 1;
    source_chunk = larger<int64_t>(1, (c.source_length + chunks - 1) / chunks);
    source_chunks = (c.source_length + source_chunk - 1) / source_chunk;
  }

  int64_t items() const { return c.batch * c.heads * row_tasks; }
  int64_t scatter_items() const { return c.batch * c.kv_heads * source_chunks; }

  void gather(int64_t item, const TensorView& source, const TensorView& out, Scratch& scratch) const {
    Real *sum = scratch.take<Real>(padded), *memory = scratch.take<Real>(padded);
    for_rows(item, [&](int64_t batch, int64_t head, int64_t row, int64_t choices) TA_INLINE_LAMBDA {
      fill<Real>(sum, 0, padded);
      for (int64_t i = choices; i < choices + c.count; ++i) {
        if (is_row(c.indices[i])) add(sum, weight(i), row_of(source, batch, head / group, c.indices[i], memory));
      }
      store_rows(out, element(out, batch, head, row), sum, padded, 1, c.columns);
    });
  }

  void dots(int64_t item, const TensorView& rows, const TensorView& source, Real* out, Scratch& scratch) const {
    Real *row_memory = scratch.take<Real>(padded), *memory = scratch.take<Real>(padded);
    for_rows(item, [&](int64_t batch, int64_t head, int64_t row, int64_t choices) TA_INLINE_LAMBDA {
      const Real* left = row_of(rows, batch, head, row, row_memory);
      for (int64_t i = choices; i < choices + c.count; ++i) {
        Vec<Real> sum{};
        if (is_row(c.indices[i])) {
          const Real* right = row_of(source, batch, head / group, c.indices[i], memory);
          for (int64_t j = 0; j < padded; j += kLanes<Real>) sum += load(left + j) * load(right + j);
        }
        out[i] = sum_of_lanes<Real>(sum);
      }
    });
  }

  // A task owns a range of the source's rows and looks through all choices for them, so that each sum has one order.
  void scatter(int64_t item, const TensorView& rows, const TensorView& out, Scratch& scratch) const {
    const int64_t begin = item % source_chunks * source_chunk, kv_head = item / source_chunks % c.kv_heads;
    const int64_t batch = item / source_chunks / c.kv_heads, size = smaller(source_chunk, c.source_length - begin);
    Real *sums = scratch.take<Real>(size * padded), *memory = scratch.take<Real>(padded);
    fill<Real>(sums, 0, size * padded);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t row = 0; row < c.length; ++row) {
        const int64_t choices = ((batch * c.heads + head) * c.length + row) * c.count;
        const Real* added = nullptr;
        for (int64_t i = choices; i < choices + c.count; ++i) {
          const int64_t place = c.indices[i] - begin;
          if (place < 0 || place >= size) continue;
          if (added == nullptr) added = row_of(rows, batch, head, row, memory);
          add(sums + place * padded, weight(i), added);
        }
      }
    }
    store_rows(out, element(out, batch, kv_head, begin), sums, padded, size, c.columns);
  }

 private:
  // Calls body(batch, head, row, where the row's choices start) for the rows of a task.
  template <class Body>
  TA_INLINE void for_rows(int64_t item, const Body& body) const {
    const int64_t head = item / row_tasks % c.heads, batch = item / row_tasks / c.heads;
    const int64_t begin = item % row_tasks * kRows, end = smaller(begin + kRows, c.length);
    for (int64_t row = begin; row < end; ++row) {
      body(batch, head, row, ((batch * c.heads + head) * c.length + row) * c.count);
    }
  }
  TA_INLINE bool is_row(int64_t index) const { return index >= 0 && index < c.source_length; }
  TA_INLINE Real weight(int64_t choice) const {
    return c.weights == nullptr ? Real{1} : static_cast<const Real*>(c.weights)[choice];
  }
  // In whole vectors.
  TA_INLINE const Real* row_of(const TensorView& view, int64_t batch, int64_t head, int64_t row, Real* memory) const {
    return padded_rows(view, batch, head, row, 1, c.columns, memory).data;
  }
  TA_INLINE void add(Real* sum, Real factor, const Real* row) const {
    for (int64_t j = 0; j < padded; j += kLanes<Real>) store(sum + j, load(sum + j) + load(row + j) * factor);
  }
};

// Calls body(ChosenRows<accumulator type>).
template <class Body>
TA_INLINE void with_chosen_rows(const RowChoice& choice, const Parallel& parallel, ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::kFloat64) {
    body(ChosenRows<double>(choice, parallel.threads));
  } else {
    body(ChosenRows<float>(choice, parallel.threads));
  }
}

inline void gather_rows(const RowChoice& choice, const TensorView& source, const TensorView& out,
                        const Parallel& parallel) {
  with_chosen_rows(choice, parallel, out.dtype, [&](const auto& rows) {
    for_each_item(parallel, rows.items(),
                  [&](int64_t item, Scratch& scratch) { rows.gather(item, source, out, scratch); });
  });
}

inline void scatter_rows(const RowChoice& choice, const TensorView& scattered, const TensorView& out,
                         const Parallel& parallel) {
  with_chosen_rows(choice, parallel, out.dtype, [&](const auto& rows) {
    for_each_item(parallel, rows.scatter_items(),
                  [&](int64_t item, Scratch& scratch) { rows.scatter(item, scattered, out, scratch); });
  });
}

inline void chosen_dots(const RowChoice& choice, const TensorView& left, const TensorView& source, void* dots,
                        const Parallel& parallel) {
  with_chosen_rows(choice, parallel, left.dtype, [&]<class Real>(const ChosenRows<Real>& rows) {
    for_each_item(parallel, rows.items(), [&](int64_t item, Scratch& scratch) {
      rows.dots(item, left, source, static_cast<Real*>(dots), scratch);
    });
  });
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
