// Hard attention's kernels of the portable tier, one instance for each element type; instantiated by
// instantiate/selection_*.cu, called by selection_dispatch.cpp.
#pragma once

#include "../selection_kernels.h"
#include "../types.h"

namespace torch_attn::cuda::simt {

constexpr int kSelectionColumns = 64;  // that a block of a gradient computes

// Blocks that shall fit into a multiprocessor's registers together, where that costs no spilling.
template <class T>
constexpr int kBlocksAtOnce = std::is_same_v<T, double> ? 1 : 2;

template <class T>
void select_keys(const AttentionProblem&, const Selection&, const SelectionOutputs&, void* workspace, const Stream&);
template <class T, int kColumns>
void selection_query_gradient(const AttentionProblem&, const SelectionBackwardTensors&, void* workspace, const Stream&);
template <class T, int kColumns>
void selection_key_gradient(const AttentionProblem&, const SelectionBackwardTensors&, void* workspace, const Stream&);
template <class T>
void selection_mask_gradient(const AttentionProblem&, const SelectionBackwardTensors&, void* workspace, const Stream&);
template <class T>
void gather_rows(const RowChoice&, const TensorView& source, const TensorView& out, const Stream&);
template <class T>
void scatter_rows(const RowChoice&, const TensorView& rows, const TensorView& out, const Stream&);
template <class T>
void chosen_dots(const RowChoice&, const TensorView& rows, const TensorView& source, void* dots, const Stream&);

}  // namespace torch_attn::cuda::simt
