// Hard attention's kernels of the tensor-core tier; instantiated by instantiate/selection_*.cu, called by
// selection_dispatch.cpp.
#pragma once

#include "../selection_kernels.h"
#include "../types.h"

namespace torch_attn::cuda::sm80 {

// T: Float16 or BFloat16. kDim: the largest head_dim served, 64 or 128.
template <class T, int kDim>
void select_keys(const AttentionProblem&, const Selection&, const SelectionOutputs&, void* workspace, const Stream&);

}  // namespace torch_attn::cuda::sm80
