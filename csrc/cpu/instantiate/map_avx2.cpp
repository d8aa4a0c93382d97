// The kernels of attention maps for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx2
#include "../map_backward.h"
#include "../map_statistics.h"
#include "../map_weights.h"

namespace torch_attn::cpu {

const MapKernelTable kAvx2MapKernels = {avx2::attention_statistics, avx2::weights_by_type<avx2::VectorPanel>,
                                        avx2::attention_map_backward};

}  // namespace torch_attn::cpu
