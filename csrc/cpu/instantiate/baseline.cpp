// The kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA baseline
#include "../backward.h"
#include "../forward.h"
#include "../tangent_backward.h"
#include "../tangent_forward.h"

namespace torch_attn::cpu {

const KernelTable kBaselineKernels = {baseline::attention_forward, baseline::attention_backward,
                                      baseline::attention_tangent_forward, baseline::attention_tangent_backward};

}  // namespace torch_attn::cpu
