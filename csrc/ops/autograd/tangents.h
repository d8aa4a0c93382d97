// Forward-mode differentiation: a call whose inputs carry tangents becomes a call of the matching jvp operator, and its
// results get theirs. Works for torch.autograd.forward_ad and for torch.func.jvp, which rests on the same tangents.
#pragma once

#include "ops/autograd/saved_call.h"

namespace torch_attn::ops {

// attention_jvp with its place in the graph of reverse mode. Its backward sees saved_inputs, which are arguments'
// inputs or, in forward mode, the dual tensors they were taken from: the backward then has tangents as well.
JvpResult differentiable_jvp(const JvpArguments& arguments, const Inputs& saved_inputs);

ForwardResult forward_with_tangents(const ForwardArguments& arguments);
BackwardResult backward_with_tangents(const BackwardArguments& arguments);

}  // namespace torch_attn::ops
