// Included by each map_*.cu of this folder, which compiles the kernels of sm80/map_variants.h for one element type.
#pragma once

#include "../map_gradient.cuh"
#include "../map_statistics.cuh"
#include "../map_weights.cuh"
#include "../mask_gradient.cuh"

#define TA_INSTANTIATE_SM80_MAPS(T)                                                                              \
  namespace torch_attn::cuda::sm80 {                                                                             \
  template void map_statistics<T>(const AttentionProblem&, const StatisticsOutputs&, void*, const Stream&);      \
  template void map_weights<T>(const AttentionProblem&, const WeightsOutputs&, void*, const Stream&);            \
  template void map_row_terms<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);      \
  template void map_query_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&); \
  template void map_key_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);   \
  template void map_mask_gradient<T>(const AttentionProblem&, const MapBackwardTensors&, void*, const Stream&);  \
  template void mask_gradient<T>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&);         \
  }
