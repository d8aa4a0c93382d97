// Included by each file of this folder, which compiles one variant of simt/variants.h.
#pragma once

#include "../forward.cuh"
#include "../key_value_gradient.cuh"
#include "../mask_gradient.cuh"
#include "../query_gradient.cuh"

#define TA_INSTANTIATE_SIMT(T, COLUMNS)                                                                                \
  namespace torch_attn::cuda::simt {                                                                                   \
  template void forward<T, COLUMNS>(const AttentionProblem&, const ForwardOutputs&, const Stream&);                    \
  template void query_gradient<T, COLUMNS>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&);     \
  template void key_value_gradient<T, COLUMNS>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&); \
  }

#define TA_INSTANTIATE_SHARED_KERNELS(T)                                                                  \
  namespace torch_attn::cuda {                                                                            \
  template void row_statistics<T>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&); \
  template void slope_gradient<T>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&); \
  namespace simt {                                                                                        \
  template void mask_gradient<T>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&);  \
  }                                                                                                       \
  }
