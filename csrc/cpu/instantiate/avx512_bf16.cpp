// bfloat16 on `vdpbf16ps`; everything else runs the AVX-512 kernels. CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx512_bf16
#include "../bfloat16/kernels.h"

namespace torch_attn::cpu {

const KernelTable kAvx512Bf16Kernels = {avx512_bf16::forward, avx512_bf16::backward, avx512_bf16::tangent_forward,
                                        avx512_bf16::tangent_backward};

}  // namespace torch_attn::cpu
