// Included by each map_*.cu of this folder, which compiles the kernels of attention maps for one element type.
#pragma once

#include "../map_gradient.cuh"
#include "../map_statistics.cuh"
#include "../map_weights.cuh"

#define TA_INSTANTIATE_MAPS(T)                                                                                   \
  namespace torch_attn::cuda {                                                                                   \
  template void map_weight_scales<T>(const AttentionProblem&, const void*, void*, const Stream&);                \
  template void map_row_statistics<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&); \
  }                                                                                                              \
  namespace torch_attn::cuda::simt {                                                                             \
  template void map_statistics<T>(const AttentionProblem&, const StatisticsOutputs&, void*, const Stream&);      \
  template void map_weights<T>(const AttentionProblem&, const WeightsOutputs&, void*, const Stream&);            \
  template void map_row_terms<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);      \
  template void map_query_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&); \
  template void map_key_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);   \
  template void map_mask_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);  \
  }
