// The kernels of attention maps, one instance for each element type; instantiated in instantiate/map_*.cu, called by
// map_dispatch.cpp.
#pragma once

#include "../map_kernels.h"
#include "../types.h"

namespace torch_attn::cuda::simt {

// The workspace holds each row's weight_scale, which map_statistics writes and map_weights reads.
template <class T>
void map_statistics(const AttentionProblem&, const StatisticsOutputs&, void* workspace, const Stream&);
template <class T>
void map_weights(const AttentionProblem&, const WeightsOutputs&, void* workspace, const Stream&);

// The workspace is that of row_statistics.cuh. map_row_terms comes first, where there are terms whose sums the caller
// does not know.
template <class T>
void map_row_terms(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_query_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_key_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);
template <class T>
void map_mask_gradient(const AttentionProblem&, const MapBackwardTensors&, void* workspace, const Stream&);

}  // namespace torch_attn::cuda::simt
