// The functions of matrix_product.h: which calls AMX takes.
#include "matrix_product.h"

namespace torch_attn::cpu {

bool gains_by_product(int64_t rows, int64_t columns, int64_t depth) {
#if defined(__x86_64__)
  if (active_isa() != Isa::kAmx || rows < 1 || columns < 1 || depth < 1) return false;
  // Operands are split once a call, which takes the time of 100 to 200 of the products that each number is part of.
  // Of MKL's time: 96 rows 1.3 to 1.5x, 64 rows 1.0 to 1.4x, 48 rows 0.8 to 1.1x; 256 rows of 64 columns 1.2 to 1.8x.
  constexpr int64_t kFewestRows = 96, kFewestColumns = 64;
  return is_isa_forced() || (rows >= kFewestRows && columns >= kFewestColumns && depth >= kFewestColumns);
#else
  (void)rows, (void)columns, (void)depth;
  return false;
#endif
}

bool matrix_product(const MatrixProduct& product, const Parallel& parallel) {
#if defined(__x86_64__)
  return amx_matrix_product(product, parallel);
#else
  (void)product, (void)parallel;
  return false;
#endif
}

}  // namespace torch_attn::cpu
