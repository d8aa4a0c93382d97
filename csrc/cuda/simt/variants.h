// The portable tier's kernels: which instances exist. One list, read by the files that instantiate them (instantiate/),
// by dispatch.cpp and, through it, by the tests.
#pragma once

#include "../kernels.h"
#include "../types.h"

namespace torch_attn::cuda::simt {

// kColumns: how many columns of an output a block computes, 64 or 128. A wider output takes several blocks, each of
// which computes the scores again.
template <class T, int kColumns>
void forward(const AttentionProblem&, const ForwardOutputs&, const Stream&);
template <class T, int kColumns>
void query_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
template <class T, int kColumns>
void key_value_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

// One instance for each element type.
template <class T>
void mask_gradient(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);

#define TA_SIMT_VARIANTS(VARIANT) \
  VARIANT(double, 64)             \
  VARIANT(float, 64)              \
  VARIANT(float, 128)             \
  VARIANT(BFloat16, 64)           \
  VARIANT(Float16, 64)

}  // namespace torch_attn::cuda::simt
