// Hard attention's kernels for this instruction set; CMakeLists.txt gives this file its compiler flags.
#define TORCH_ATTN_ISA avx2
#include "../chosen_rows.h"
#include "../select_keys.h"
#include "../selection_backward.h"
#include "../selection_kernels.h"

namespace torch_attn::cpu {

const SelectionTable kAvx2Selection = {avx2::select_keys, avx2::select_keys_backward, avx2::gather_rows,
                                       avx2::scatter_rows, avx2::chosen_dots};

}  // namespace torch_attn::cpu
