// attention_forward and attention_backward written in ATen operators. Differentiable to any order, so it runs where the
// fused kernels cannot: under torch.func's transforms, in forward-mode differentiation, when the backward itself is
// differentiated, and on devices without a kernel.
#pragma once

#include "ops/arguments.h"

namespace torch_attn::ops::composite {

ForwardResult attention_forward(const ForwardArguments& arguments);

// A function of grad_out, grad_logsumexp and the forward's inputs; the saved out and logsumexp are not read, so that
// derivatives of it see everything those depend on.
BackwardResult attention_backward(const BackwardArguments& arguments);

// The bits of core/dropout.h, computed on the CPU.
Tensor dropout_keep_mask(const DropoutArguments& arguments);

}  // namespace torch_attn::ops::composite
