// Products of float32 matrices on AMX. CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA amx
#include "../bfloat16/matrix_product.h"

namespace torch_attn::cpu {

bool amx_matrix_product(const MatrixProduct& product, const Parallel& parallel) {
  return amx::multiply_matrices(product, parallel);
}

}  // namespace torch_attn::cpu
