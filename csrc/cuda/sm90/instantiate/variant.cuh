// Included by each file of this folder, which compiles the variants of sm90/variants.h for one type.
#pragma once

#include "../backward.cuh"
#include "../forward.cuh"

#define TA_INSTANTIATE_SM90(T, DIM)                                                                                  \
  namespace torch_attn::cuda::sm90 {                                                                                 \
  template void forward<T, DIM>(const AttentionProblem&, const ForwardOutputs&, const Stream&);                      \
  template void all_gradients<T, DIM>(const AttentionProblem&, const BackwardTensors&, void*, void*, const Stream&); \
  }
