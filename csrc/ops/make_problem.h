// The only place that turns tensors into an AttentionProblem, the plain data that kernels read (core/problem.h).
#pragma once

#include "core/problem.h"
#include "ops/arguments.h"

namespace torch_attn::ops {

// The problem, and the tensors it points into.
struct PreparedProblem {
  AttentionProblem problem;
  std::array<Tensor, 8> tensors;
  Tensor query_starts, key_starts;  // of packed sequences, (B + 1), int64; undefined: not packed
};

// Checks the arguments. rng_state is read only if there is dropout.
PreparedProblem make_problem(const ForwardArguments& arguments, const Tensor& rng_state);

// Of arguments that have been checked.
PreparedProblem make_checked_problem(const ForwardArguments& arguments, const Tensor& rng_state);

// Lets random bits follow the state, where the call has no dropout to do so.
void set_rng_state(AttentionProblem& problem, const Tensor& rng_state);

// A problem that holds what core/dropout.h's bits depend on, and nothing else.
AttentionProblem make_dropout_problem(const DropoutArguments& arguments);

// The tensor itself if neighbours in its last dimension are neighbours in memory, as kernels require; else a copy.
Tensor with_unit_column_stride(const Tensor& tensor);

// Strides are those of broadcasting to four dimensions: 0 where the tensor's size is 1.
TensorView view_of(const Tensor& tensor);

// The same for what kernels take with column stride 1 only.
TensorView view_of_matrix(const Tensor& tensor);

// (Hq) or (B, Hq): strides of batch and head alone.
TensorView view_per_head(const Tensor& tensor);

}  // namespace torch_attn::ops
