// The kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx512
#include "../backward.h"
#include "../forward.h"
#include "../tangent_backward.h"
#include "../tangent_forward.h"

namespace torch_attn::cpu {

const KernelTable kAvx512Kernels = {avx512::attention_forward, avx512::attention_backward,
                                    avx512::attention_tangent_forward, avx512::attention_tangent_backward};

}  // namespace torch_attn::cpu
