// The kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx2
#include "../backward.h"
#include "../forward.h"
#include "../tangent_backward.h"
#include "../tangent_forward.h"

namespace torch_attn::cpu {

const KernelTable kAvx2Kernels = {avx2::attention_forward, avx2::attention_backward, avx2::attention_tangent_forward,
                                  avx2::attention_tangent_backward};

}  // namespace torch_attn::cpu
