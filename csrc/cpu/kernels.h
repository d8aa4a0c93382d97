// The CPU attention kernels' whole interface; included by csrc/ops and by dispatch.cpp. No Torch type appears here.
//
// Every tensor is described in core/problem.h. Outputs need no initialisation: each element is written, also for empty
// rows and for sizes of zero. Results do not depend on which thread runs which task; those of the backward pass may
// depend (in rounding only) on the number of threads.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "isa.h"

namespace torch_attn::cpu {

// Runs task(task_context, i) for every i in [0, count), on up to `threads` threads, and returns when all are done. It
// may run them all on the calling thread. Exceptions from a task must reach the caller.
struct Parallel {
  int threads = 1;
  void* context = nullptr;
  void (*run)(void* context, int64_t count, void (*task)(void* task_context, int64_t index), void* task_context);
};

void attention_forward(const AttentionProblem& problem, const ForwardOutputs& outputs, const Parallel& parallel);

void attention_backward(const AttentionProblem& problem, const BackwardTensors& tensors, const Parallel& parallel);

// Forward-mode derivatives of the two: forward with its outputs' tangents, and the tangents of backward's gradients. By
// the symmetry of second derivatives they also make up the backward pass of backward.
void attention_tangent_forward(const AttentionProblem& problem, const Tangents& tangents,
                               const TangentForwardOutputs& outputs, const Parallel& parallel);

void attention_tangent_backward(const AttentionProblem& problem, const Tangents& tangents,
                                const TangentBackwardTensors& tensors, const Parallel& parallel);

// The dropout bits themselves, true where a weight is kept: out is (B, Hq, L, S), contiguous.
void dropout_keep_mask(const AttentionProblem& problem, bool* out, const Parallel& parallel);

}  // namespace torch_attn::cpu
