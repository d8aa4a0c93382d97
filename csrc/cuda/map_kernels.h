// The CUDA kernels of attention maps: their whole interface, as kernels.h is for attention itself. Included by
// csrc/ops, map_dispatch.cpp and the tests. Calls have no dropout and no value. Results are the same in every run.
#pragma once

#include "../core/map_problem.h"
#include "kernels.h"

namespace torch_attn::cuda {

// As forward_tiers and backward_tiers.
std::vector<TierAnswer> map_forward_tiers(const AttentionProblem& problem, const DeviceFacts& device);
std::vector<TierAnswer> map_backward_tiers(const AttentionProblem& problem, const BackwardTensors& tensors,
                                           const DeviceFacts& device);

// Scratch memory as kernels.h wants it.
size_t map_forward_workspace_bytes(const AttentionProblem& problem);
void attention_statistics(const AttentionProblem& problem, const StatisticsOutputs& outputs, void* workspace,
                          const Stream& stream);
void attention_weights(const AttentionProblem& problem, const WeightsOutputs& outputs, void* workspace,
                       const Stream& stream);

size_t map_backward_workspace_bytes(const AttentionProblem& problem);
void attention_map_backward(const AttentionProblem& problem, const MapBackwardTensors& tensors, void* workspace,
                            const Stream& stream);

}  // namespace torch_attn::cuda
