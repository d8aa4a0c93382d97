// Kernels that every tier's backward pass uses, one instance for each element type; instantiated in simt/instantiate.
#pragma once

#include "kernels.h"
#include "types.h"

namespace torch_attn::cuda {

// Fills the workspace with what the gradient kernels need of each row.
template <class T>
void row_statistics(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
// After query_gradient: grad_alibi_slopes.
template <class T>
void slope_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

}  // namespace torch_attn::cuda
