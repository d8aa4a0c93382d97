// The tensor-core tier's kernels: which instances exist. One list, read by the files that instantiate them
// (instantiate/), by tier.cpp and, through it, by the tests.
#pragma once

#include "../kernels.h"
#include "../types.h"

namespace torch_attn::cuda::sm80 {

// T: Float16 or BFloat16. kDim: the largest head_dim and value_dim served, 64, 128 or 256. kFull: with softcap, ALiBi,
// attn_mask and dropout; see score_tile.cuh.
template <class T, int kDim, bool kFull>
void forward(const AttentionProblem&, const ForwardOutputs&, const Stream&);
template <class T, int kDim, bool kFull>
void query_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
template <class T, int kDim, bool kFull>
void key_value_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

#define TA_SM80_VARIANTS(VARIANT) \
  VARIANT(Float16, 64)            \
  VARIANT(Float16, 128)           \
  VARIANT(Float16, 256)           \
  VARIANT(BFloat16, 64)           \
  VARIANT(BFloat16, 128)          \
  VARIANT(BFloat16, 256)

}  // namespace torch_attn::cuda::sm80
