// The tensor-core tier's kernels of attention maps, and of the gradient of attn_mask: one instance for each element
// type, which serves every head dimension; instantiated in instantiate/map_*.cu, called by map_dispatch.cpp and
// tier.cpp. Workspaces are those of simt/map_variants.h.
#pragma once

#include "../map_kernels.h"
#include "../types.h"

namespace torch_attn::cuda::sm80 {

// T: Float16, BFloat16, or float, whose products are of TF32.
template <class T>
void map_statistics(const AttentionProblem&, const StatisticsOutputs&, void* workspace, const Stream&);
template <class T>
void map_weights(const AttentionProblem&, const WeightsOutputs&, void* workspace, const Stream&);
template <class T>
void map_row_terms(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_query_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_key_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_mask_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);

// Attention's own, from row_statistics.
template <class T>
void mask_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

}  // namespace torch_attn::cuda::sm80
