// The operators written in ATen operators. Differentiable to any order, so they run where the fused kernels end: in
// derivatives of the third order and beyond, and on devices without a kernel.
#pragma once

#include "ops/arguments.h"

namespace torch_attn::ops::composite {

ForwardResult attention_forward(const ForwardArguments& arguments);

// A function of grad_out, grad_logsumexp and the forward's inputs; the saved out and logsumexp are not read, so that
// derivatives of it see everything those depend on.
BackwardResult attention_backward(const BackwardArguments& arguments);

// Forward-mode derivatives of the two above. attention_backward_jvp reads neither out, logsumexp nor their tangents.
JvpResult attention_jvp(const JvpArguments& arguments);
BackwardResult attention_backward_jvp(const BackwardJvpArguments& arguments);

// The bits of core/dropout.h, computed on the CPU.
Tensor dropout_keep_mask(const DropoutArguments& arguments);

}  // namespace torch_attn::ops::composite
