// How a forward pass cuts the query rows into blocks, and a block's rows as panels. Included by forward.h,
// select_keys.h and map_statistics.h.
#pragma once

#include "pack.h"
#include "panel.h"
#include "scratch.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

constexpr int64_t kForwardRows = 256;

// Query rows per task: fewer where that leaves threads idle.
template <class Real>
int64_t query_block_rows(const AttentionProblem& p, int threads) {
  int64_t most = kForwardRows;
  const auto items = [&] { return p.batch * p.heads * ((p.query_length + most - 1) / most); };
  while (most > 2 * kMaxVectors * kLanes<Real> && items() < 4 * threads) most /= 2;
  return balanced_block<Real>(p.query_length, most);
}

// [lane offset · head_dim][dim][lane]
template <class Real>
Real* load_query_panels(const AttentionProblem& p, int64_t batch, int64_t head, int64_t row, int64_t rows,
                        const Panels& panels, Scratch& scratch) {
  Real* query = scratch.take<Real>(panels.lanes * p.head_dim);
  Real* memory = scratch.take<Real>(rows * round_up(p.head_dim, kLanes<Real>));
  const Rows<Real> loaded = padded_rows(p.query, batch, head, row, rows, p.head_dim, memory);
  for (int i = 0; i < panels.count; ++i) {
    const int64_t offset = panels.offset[i];
    pack_panel(query + offset * p.head_dim, panels.vectors[i] * kLanes<Real>, loaded.data + offset * loaded.stride,
               loaded.stride, rows - offset, p.head_dim);
  }
  return query;
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
