// The functions of matrix_product.h: which calls AMX takes.
#include "matrix_product.h"

namespace torch_attn::cpu {

bool gains_by_product(int64_t rows, int64_t columns, int64_t depth) {
#if defined(__x86_64__)
  if (active_isa() != Isa::kAmx || rows < 1 || columns < 1 || depth < 1) return false;
  // Operands are split once a call, which few products with each number do not make up for. Forward and the two
  // gradients against MKL's: 96 rows of 512 or 768 columns 1.12 to 1.5x, 64 rows 0.94 to 1.4x, 48 rows 0.8 to 1.0x; 128
  // rows of 128 columns 1.25 to 1.5x, 96 rows of 64 columns 0.8 to 1.15x.
  constexpr int64_t kFewestRows = 96, kFewestColumns = 64, kFewestProducts = int64_t{1} << 21;
  if (is_isa_forced()) return true;
  return rows >= kFewestRows && columns >= kFewestColumns && depth >= kFewestColumns &&
         rows * columns >= (kFewestProducts + depth - 1) / depth;
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
