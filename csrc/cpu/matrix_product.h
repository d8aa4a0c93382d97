// Products of float32 matrices, which the module's projections are made of: their whole interface. Included by
// ops/cpu/projection.cpp, product_dispatch.cpp and bfloat16/matrix_product.h. No Torch type appears here. Numbers below
// 2^-110 lose bits (bfloat16/pieces.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace torch_attn::cpu {

// An operand of a product that sums over `depth` numbers: lines of consecutive numbers, stride apart. A line holds the
// numbers of one sum (along_depth), or one number of each.
struct Matrix {
  const float* data = nullptr;
  int64_t stride = 0;
  bool along_depth = true;
};

struct MatrixProduct {
  int64_t rows = 0, columns = 0, depth = 0;
  Matrix left, right;           // rows × depth, depth × columns
  float* out = nullptr;         // rows × columns, contiguous; every element is written
  const float* bias = nullptr;  // (columns), added to each row; null: none
};

// Whether the instruction set in use has a kernel that is faster than MKL's for a product of these sizes and, taken
// together, those that its gradients are; or one at all, where the instruction set is forced. AMX alone has.
bool gains_by_product(int64_t rows, int64_t columns, int64_t depth);

// False: a number of an operand is infinite, and out is of no use. To be called where gains_by_product. out is the same
// for any number of threads.
bool matrix_product(const MatrixProduct& product, const Parallel& parallel);

// What instantiate/product_amx.cpp offers.
#if defined(__x86_64__)
bool amx_matrix_product(const MatrixProduct& product, const Parallel& parallel);
#endif

}  // namespace torch_attn::cpu
