// How a block of query rows is cut into panels of at most kMaxVectors vectors of lanes. Included by gemm.h.
#pragma once

#include "vec.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// The widest panel, in vectors. AVX2's 16 registers hold 4 × 3 accumulators, 3 loaded vectors and a broadcast one; the
// 32 of AVX-512 hold 8 × 3.
constexpr int kMaxVectors = 3;

struct Panels {
  static constexpr int kMax = 64;
  int count = 0;
  int offset[kMax];   // first lane
  int vectors[kMax];  // 1 … kMaxVectors
  int64_t lanes = 0;  // of all panels

  TA_INLINE int after(int panel) const { return panel + 1 < count ? panel + 1 : 0; }

  template <class Real>
  static Panels of(int64_t rows) {
    Panels panels;
    panels.cut(rows, kLanes<Real>);
    return panels;
  }

  // Near-equal widths: four vectors become 2 + 2, not 3 + 1. In place, as a copy of the arrays costs a short call more
  // than filling them does.
  TA_INLINE void cut(int64_t rows, int vector_lanes) {
    count = 0, lanes = 0;
    int64_t left = (rows + vector_lanes - 1) / vector_lanes;
    while (left > 0) {
      const int64_t pieces = (left + kMaxVectors - 1) / kMaxVectors;
      const int taken = pieces > 2 ? kMaxVectors : static_cast<int>((left + pieces - 1) / pieces);
      offset[count] = static_cast<int>(lanes);
      vectors[count] = taken;
      ++count;
      lanes += taken * vector_lanes;
      left -= taken;
    }
  }
};

// Calls body.template operator()<kVectors>() for a panel width known at run time.
template <class Body>
TA_INLINE void with_vectors(int vectors, const Body& body) {
  static_assert(kMaxVectors == 3);
  switch (vectors) {
    case 3:
      return body.template operator()<3>();
    case 2:
      return body.template operator()<2>();
    default:
      return body.template operator()<1>();
  }
}

// Rows per block: near-equal blocks of at most max_rows, a multiple of the vector length.
template <class Real>
TA_INLINE int64_t balanced_block(int64_t rows, int64_t max_rows) {
  const int64_t blocks = (rows + max_rows - 1) / max_rows;
  return blocks == 0 ? kLanes<Real> : round_up((rows + blocks - 1) / blocks, kLanes<Real>);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
