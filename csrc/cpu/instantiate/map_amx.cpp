// Weights on AMX; the other kernels of attention maps are those of AVX-512. CMakeLists.txt gives this file
// its compiler flags.
#define TORCH_ATTN_ISA amx
#include "../bfloat16/map_kernels.h"

namespace torch_attn::cpu {

const MapKernelTable kAmxMapKernels = {amx::map_statistics, amx::map_weights, amx::map_backward};

}  // namespace torch_attn::cpu
