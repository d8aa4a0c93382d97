// wgmma on the host: what csrc/cuda/ptx_sm90a.cuh calls when it is compiled for the emulator. Products are computed as
// late as they may be, when a thread waits for them, so that one that is not waited for, or whose operands are written
// too early, shows.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace emulation {

// What a descriptor of ptx_sm90a.cuh says.
struct SharedMatrix {
  const char* start;
  int group_bytes, column_bytes;

  SharedMatrix(const void* start, int group_bytes, int column_bytes)
      : start(static_cast<const char*>(start)), group_bytes(group_bytes), column_bytes(column_bytes) {}
  SharedMatrix after(int bytes) const { return {start + bytes, group_bytes, column_bytes}; }
};

// d (64 x 8 · groups) = [d +] a (64 x 16) · b (16 x 8 · groups).
void issue_product(Half type, float (*d)[4], int groups, const SharedMatrix& a, bool a_is_transposed,
                   const SharedMatrix& b, bool b_is_transposed, bool add);
// d += a, in registers, · b, which is transposed.
void issue_product(Half type, float (*d)[4], int groups, const uint32_t (&a)[4], const SharedMatrix& b);
void commit_products();
void wait_for_products(int groups_left);

void reset_products(int threads);  // at the start of a block

}  // namespace emulation
