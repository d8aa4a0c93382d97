// The entry points that each instruction set's translation unit (instantiate/*.cpp) offers to dispatch.cpp.
#pragma once

#include "kernels.h"

namespace torch_attn::cpu {

struct KernelTable {
  void (*forward)(const AttentionProblem&, const ForwardOutputs&, const Parallel&);
  void (*backward)(const AttentionProblem&, const BackwardTensors&, const Parallel&);
  void (*tangent_forward)(const AttentionProblem&, const Tangents&, const TangentForwardOutputs&, const Parallel&);
  void (*tangent_backward)(const AttentionProblem&, const Tangents&, const TangentBackwardTensors&, const Parallel&);
};

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
#endif

}  // namespace torch_attn::cpu
