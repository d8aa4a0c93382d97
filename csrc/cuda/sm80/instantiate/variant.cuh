// Included by each file of this folder, which compiles one variant of sm80/variants.h.
#pragma once

#include "../forward.cuh"
#include "../key_value_gradient.cuh"
#include "../query_gradient.cuh"

#define TA_INSTANTIATE_SM80_KIND(T, DIM, FULL)                                                                       \
  template void forward<T, DIM, FULL>(const AttentionProblem&, const ForwardOutputs&, const Stream&);                \
  template void query_gradient<T, DIM, FULL>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&); \
  template void key_value_gradient<T, DIM, FULL>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&);

#define TA_INSTANTIATE_SM80(T, DIM)       \
  namespace torch_attn::cuda::sm80 {      \
  TA_INSTANTIATE_SM80_KIND(T, DIM, false) \
  TA_INSTANTIATE_SM80_KIND(T, DIM, true)  \
  }
