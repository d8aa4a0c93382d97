// Hard attention's kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA baseline
#include "../chosen_rows.h"
#include "../select_keys.h"
#include "../selection_backward.h"
#include "../selection_kernels.h"

namespace torch_attn::cpu {

const SelectionTable kBaselineSelection = {baseline::select_keys, baseline::select_keys_backward, baseline::gather_rows,
                                           baseline::scatter_rows, baseline::chosen_dots};

}  // namespace torch_attn::cpu
