// Kernels that both tiers use, one instance for each element type; instantiated in simt/instantiate.
#pragma once

#include "map_kernels.h"
#include "types.h"

namespace torch_attn::cuda {

// Fills the workspace with what the gradient kernels need of each row.
template <class T>
void row_statistics(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
// After query_gradient: grad_alibi_slopes.
template <class T>
void slope_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

// Of attention maps: fills the workspace with each row's weight_scale; and with its RowStatistics, delta as far as the
// caller knows it.
template <class T>
void map_weight_scales(const AttentionProblem&, const void* logsumexp, void* workspace, const Stream&);
template <class T>
void map_row_statistics(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);

}  // namespace torch_attn::cuda
