// bfloat16 weights on `vdpbf16ps`; the other kernels of attention maps are those of AVX-512. CMakeLists.txt gives this
// file its compiler flags.
#define TORCH_ATTN_ISA avx512_bf16
#include "../bfloat16/map_kernels.h"

namespace torch_attn::cpu {

const MapKernelTable kAvx512Bf16MapKernels = {avx512_bf16::map_statistics, avx512_bf16::map_weights,
                                              avx512_bf16::map_backward};

}  // namespace torch_attn::cpu
