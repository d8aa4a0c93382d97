// The CPU kernels of attention maps: their whole interface, as kernels.h is for attention itself. Included by csrc/ops,
// map_dispatch.cpp and the instantiations.
#pragma once

#include "../core/map_problem.h"
#include "kernels.h"

namespace torch_attn::cpu {

void attention_statistics(const AttentionProblem& problem, const StatisticsOutputs& outputs, const Parallel& parallel);

void attention_weights(const AttentionProblem& problem, const SoftmaxOutputs& outputs, const Parallel& parallel);

// Where rows are selected, their positions must not fall.
void attention_map_backward(const AttentionProblem& problem, const MapBackwardTensors& tensors,
                            const Parallel& parallel);

// What each instruction set's translation unit offers.
struct MapKernelTable {
  void (*statistics)(const AttentionProblem&, const StatisticsOutputs&, const Parallel&);
  void (*weights)(const AttentionProblem&, const SoftmaxOutputs&, const Parallel&);
  void (*backward)(const AttentionProblem&, const MapBackwardTensors&, const Parallel&);
};

extern const MapKernelTable kBaselineMapKernels;
#if defined(__x86_64__)
extern const MapKernelTable kAvx2MapKernels;
extern const MapKernelTable kAvx512MapKernels;
extern const MapKernelTable kAvx512Bf16MapKernels;
extern const MapKernelTable kAmxMapKernels;
#endif

}  // namespace torch_attn::cpu
