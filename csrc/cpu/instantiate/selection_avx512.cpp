// Hard attention's kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx512
#include "../chosen_rows.h"
#include "../select_keys.h"
#include "../selection_backward.h"
#include "../selection_kernels.h"

namespace torch_attn::cpu {

const SelectionTable kAvx512Selection = {avx512::select_keys, avx512::select_keys_backward, avx512::gather_rows,
                                         avx512::scatter_rows, avx512::chosen_dots};

}  // namespace torch_attn::cpu
