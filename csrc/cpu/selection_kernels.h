// The interface of hard attention's CPU kernels, and the table of them that each instruction set offers; see kernels.h.
#pragma once

#include "../core/selection.h"
#include "kernels.h"

namespace torch_attn::cpu {

void select_keys(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                 const Parallel& parallel);

void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                          const Parallel& parallel);

struct SelectionTable {
  void (*select)(const AttentionProblem&, const Selection&, const SelectionOutputs&, const Parallel&);
  void (*backward)(const AttentionProblem&, const SelectionBackwardTensors&, const Parallel&);
};

extern const SelectionTable kBaselineSelection;
#if defined(__x86_64__)
extern const SelectionTable kAvx2Selection;
extern const SelectionTable kAvx512Selection;  // also AMX's
#endif

}  // namespace torch_attn::cpu
