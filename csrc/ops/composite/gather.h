// gather_values and its backward in ATen operators: differentiable to any order. Keeps all gathered rows.
#pragma once

#include "ops/selection.h"

namespace torch_attn::ops::composite {

Tensor gather_values(const GatherArguments& arguments);
GatherBackwardResult gather_values_backward(const GatherBackwardArguments& arguments);

}  // namespace torch_attn::ops::composite
