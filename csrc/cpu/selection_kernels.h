// The interface of hard attention's CPU kernels, and the table of them that each instruction set offers; see kernels.h.
#pragma once

#include "../core/selection.h"
#include "kernels.h"

namespace torch_attn::cpu {

void select_keys(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                 const Parallel& parallel);

void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                          const Parallel& parallel);

// All tensors have one dtype and column stride 1. out (batch, heads, length, columns) = Σ_count weight · source row.
void gather_rows(const RowChoice& choice, const TensorView& source, const TensorView& out, const Parallel& parallel);

// Its transpose: out (batch, kv_heads, source_length, columns) = Σ weight · row over the rows that chose it, in order.
void scatter_rows(const RowChoice& choice, const TensorView& rows, const TensorView& out, const Parallel& parallel);

// dots (batch, heads, length, count), contiguous, accumulator type = row · source row.
void chosen_dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* dots,
                 const Parallel& parallel);

struct SelectionTable {
  void (*select)(const AttentionProblem&, const Selection&, const SelectionOutputs&, const Parallel&);
  void (*backward)(const AttentionProblem&, const SelectionBackwardTensors&, const Parallel&);
  void (*gather)(const RowChoice&, const TensorView&, const TensorView&, const Parallel&);
  void (*scatter)(const RowChoice&, const TensorView&, const TensorView&, const Parallel&);
  void (*dots)(const RowChoice&, const TensorView&, const TensorView&, void*, const Parallel&);
};

extern const SelectionTable kBaselineSelection;
#if defined(__x86_64__)
extern const SelectionTable kAvx2Selection;
extern const SelectionTable kAvx512Selection;  // also of avx512_bf16 and amx
#endif

}  // namespace torch_attn::cpu
