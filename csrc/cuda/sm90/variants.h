// The Hopper tier's kernels: which instances exist. Read by the files that instantiate them (instantiate/) and by
// tier.cpp.
#pragma once

#include "../kernels.h"
#include "../types.h"

namespace torch_attn::cuda::sm90 {

// T: Float16 or BFloat16. kDim: the largest head_dim and value_dim served.
template <class T, int kDim>
void forward(const AttentionProblem&, const ForwardOutputs&, const Stream&);
template <class T, int kDim>
void all_gradients(const AttentionProblem&, const BackwardTensors&, void* statistics, void* workspace, const Stream&);

#define TA_SM90_VARIANTS(VARIANT) \
  VARIANT(Float16, 64)            \
  VARIANT(Float16, 128)           \
  VARIANT(BFloat16, 64)           \
  VARIANT(BFloat16, 128)

}  // namespace torch_attn::cuda::sm90
