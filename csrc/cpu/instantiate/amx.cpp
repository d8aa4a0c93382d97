// bfloat16, float32 and float16 on AMX; everything else runs the AVX-512 kernels. CMakeLists.txt gives this file its
// compiler flags.
#define TORCH_ATTN_ISA amx
#include "../bfloat16/kernels.h"

namespace torch_attn::cpu {

const KernelTable kAmxKernels = {amx::forward, amx::backward, amx::tangent_forward, amx::tangent_backward};

}  // namespace torch_attn::cpu
