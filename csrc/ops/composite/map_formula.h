// The operators on attention maps written in ATen operators. Differentiable to any order, so they run where the fused
// kernels end: in second derivatives, in forward mode, and on devices without a kernel. They keep the (L, S) matrix.
#pragma once

#include "ops/map_operators.h"

namespace torch_attn::ops::composite {

StatisticsResult attention_statistics_forward(const StatisticsArguments& arguments);
WeightsResult attention_weights_forward(const WeightsArguments& arguments);

// The two operators one after the other.
WithWeightsResult attention_with_weights_forward(const WithWeightsArguments& arguments);

// Functions of the incoming gradients and the forward's inputs alone; of the saved results only the keys are read, so
// that derivatives see everything the others depend on.
MapBackwardResult attention_statistics_backward(const StatisticsBackwardArguments& arguments);
MapBackwardResult attention_weights_backward(const WeightsBackwardArguments& arguments);

}  // namespace torch_attn::ops::composite
