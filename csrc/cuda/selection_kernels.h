// Hard attention's CUDA kernels, as kernels.h has those of soft attention; the same conventions hold. Included by
// csrc/ops and by selection_dispatch.cpp. core/selection.h says what the kernels read and write.
#pragma once

#include "../core/selection.h"
#include "kernels.h"

namespace torch_attn::cuda {

// select_keys needs select_keys_workspace_bytes() of scratch memory, 16-byte aligned.
size_t select_keys_workspace_bytes(const AttentionProblem& problem, const Selection& selection);
void select_keys(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                 void* workspace, const Stream& stream);
// As forward_tiers and backward_tiers.
std::vector<TierAnswer> select_keys_tiers(const AttentionProblem& problem, const DeviceFacts& device);
std::vector<TierAnswer> select_keys_backward_tiers();

size_t select_keys_backward_workspace_bytes(const AttentionProblem& problem);
void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors, void* workspace,
                          const Stream& stream);

// All tensors have one dtype and column stride 1. out (batch, heads, length, columns) = Σ_count weight · source row.
void gather_rows(const RowChoice& choice, const TensorView& source, const TensorView& out, const Stream& stream);

// Its transpose: out (batch, kv_heads, source_length, columns) = Σ weight · row over the rows that chose it, in order.
void scatter_rows(const RowChoice& choice, const TensorView& rows, const TensorView& out, const Stream& stream);

// dots (batch, heads, length, count), contiguous, accumulator type = row · source row.
void chosen_dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* dots,
                 const Stream& stream);

}  // namespace torch_attn::cuda
