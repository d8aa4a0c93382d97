// ldmatrix, stmatrix and mma.sync on the host: what csrc/cuda/ptx.cuh and ptx_sm90.cuh call when they are compiled for
// the emulator.
#pragma once

#include <cstdint>

namespace emulation {

enum class Half { kFloat16, kBFloat16 };

// Four 8x8 matrices of 16-bit elements. Lane 8m + r names row r of matrix m; lane l receives of each matrix the
// elements (l / 4, 2 (l % 4)) and the one right of it, or of its transpose.
void load_matrices(uint32_t (&result)[4], const void* row, bool transpose);

// The way back: lane l brings of each matrix the elements that it would receive.
void store_matrices(void* row, const uint32_t (&words)[4]);

// d (16x8, float) += a (16x16) · b (16x8).
void multiply_accumulate_16x8x16(Half type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// d (16x8, float) += a (16x8) · b (8x8), of whose numbers only the bits of TF32 are read.
void multiply_accumulate_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace emulation
