// The kernels of attention maps for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx512
#include "../map_backward.h"
#include "../map_statistics.h"
#include "../map_weights.h"

namespace torch_attn::cpu {

const MapKernelTable kAvx512MapKernels = {avx512::attention_statistics, avx512::weights_by_type<avx512::VectorPanel>,
                                          avx512::attention_map_backward};

}  // namespace torch_attn::cpu
