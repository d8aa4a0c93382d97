// The kernels of attention maps for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA baseline
#include "../map_backward.h"
#include "../map_statistics.h"
#include "../map_weights.h"

namespace torch_attn::cpu {

const MapKernelTable kBaselineMapKernels = {
    baseline::attention_statistics, baseline::weights_by_type<baseline::VectorPanel>, baseline::attention_map_backward};

}  // namespace torch_attn::cpu
