// The kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx2
#include "../backward.h"
#include "../forward.h"

namespace torch_attn::cpu {

const KernelTable kAvx2Kernels = {avx2::attention_forward, avx2::attention_backward};

}  // namespace torch_attn::cpu
