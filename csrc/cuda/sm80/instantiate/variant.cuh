// Included by each file of this folder, which compiles one variant of sm80/variants.h.
#pragma once

#include "../all_gradients.cuh"
#include "../combine.cuh"
#include "../decode.cuh"
#include "../forward.cuh"
#include "../key_value_gradient.cuh"
#include "../query_gradient.cuh"

#define TA_INSTANTIATE_SM80_KIND(T, DIM, FULL)                                                                       \
  template void forward<T, DIM, FULL>(const AttentionProblem&, const ForwardOutputs&, const Stream&);                \
  template void decode<T, DIM, FULL>(const AttentionProblem&, int, void*, const Stream&);                            \
  template void query_gradient<T, DIM, FULL>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&); \
  template void key_value_gradient<T, DIM, FULL>(const AttentionProblem&, const BackwardTensors&, void*, const Stream&);

#define TA_INSTANTIATE_SM80(T, DIM)       \
  namespace torch_attn::cuda::sm80 {      \
  TA_INSTANTIATE_SM80_KIND(T, DIM, false) \
  TA_INSTANTIATE_SM80_KIND(T, DIM, true)  \
  }

#define TA_INSTANTIATE_SM80_FUSED_KIND(T, DIM, FULL)                                                       \
  template void all_gradients<T, DIM, FULL>(const AttentionProblem&, const BackwardTensors&, void*, void*, \
                                            const Stream&);

// Those of TA_SM80_FUSED_VARIANTS.
#define TA_INSTANTIATE_SM80_FUSED(T, DIM)       \
  namespace torch_attn::cuda::sm80 {            \
  TA_INSTANTIATE_SM80_FUSED_KIND(T, DIM, false) \
  TA_INSTANTIATE_SM80_FUSED_KIND(T, DIM, true)  \
  }

// Once for each type.
#define TA_INSTANTIATE_SM80_COMBINE(T)                                                                 \
  namespace torch_attn::cuda::sm80 {                                                                   \
  template void combine<T>(const AttentionProblem&, const ForwardOutputs&, int, void*, const Stream&); \
  }
