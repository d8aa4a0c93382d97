// The tensor-core tier's kernels: which instances exist. One list, read by the files that instantiate them
// (instantiate/), by tier.cpp and, through it, by the tests.
#pragma once

#include "../kernels.h"
#include "../types.h"

namespace torch_attn::cuda::sm80 {

// T: Float16, BFloat16, or float, whose products are of TF32. kDim: the largest head_dim and value_dim served, 64, 128
// or 256. kFull: with softcap, ALiBi, attn_mask, dropout and pages; see score_tile.cuh.
template <class T, int kDim, bool kFull>
void forward(const AttentionProblem&, const ForwardOutputs&, const Stream&);
template <class T, int kDim, bool kFull>
void decode(const AttentionProblem&, int splits, void* workspace, const Stream&);
template <class T, int kDim, bool kFull>
void query_gradient(const AttentionProblem&, const BackwardTensors&, void* statistics, const Stream&);
template <class T, int kDim, bool kFull>
void key_value_gradient(const AttentionProblem&, const BackwardTensors&, void* statistics, const Stream&);

template <class T, int kDim, bool kFull>
void all_gradients(const AttentionProblem&, const BackwardTensors&, void* statistics, void* workspace, const Stream&);

// After decode.
template <class T>
void combine(const AttentionProblem&, const ForwardOutputs&, int splits, void* workspace, const Stream&);

#define TA_SM80_VARIANTS(VARIANT) \
  VARIANT(Float16, 64)            \
  VARIANT(Float16, 128)           \
  VARIANT(Float16, 256)           \
  VARIANT(BFloat16, 64)           \
  VARIANT(BFloat16, 128)          \
  VARIANT(BFloat16, 256)          \
  VARIANT(float, 64)              \
  VARIANT(float, 128)

// Those of which all_gradients exists; wider ones would not fit into the registers.
#define TA_SM80_FUSED_VARIANTS(VARIANT) \
  VARIANT(Float16, 64)                  \
  VARIANT(Float16, 128)                 \
  VARIANT(BFloat16, 64)                 \
  VARIANT(BFloat16, 128)

}  // namespace torch_attn::cuda::sm80
