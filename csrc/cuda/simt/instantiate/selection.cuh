// Included by the files selection_*.cu of this folder, each of which compiles one type of simt/selection_variants.h.
#pragma once

#include "../chosen_rows.cuh"
#include "../select_keys.cuh"
#include "../selection_gradient.cuh"
#include "../selection_variants.h"

#define TA_INSTANTIATE_SELECTION(T)                                                                                    \
  namespace torch_attn::cuda::simt {                                                                                   \
  template void select_keys<T>(const AttentionProblem&, const Selection&, const SelectionOutputs&, void*,              \
                               const Stream&);                                                                         \
  template void selection_query_gradient<T, kSelectionColumns>(const AttentionProblem&,                                \
                                                               const SelectionBackwardTensors&, void*, const Stream&); \
  template void selection_key_gradient<T, kSelectionColumns>(const AttentionProblem&, const SelectionBackwardTensors&, \
                                                             void*, const Stream&);                                    \
  template void selection_mask_gradient<T>(const AttentionProblem&, const SelectionBackwardTensors&, void*,            \
                                           const Stream&);                                                             \
  template void gather_rows<T>(const RowChoice&, const TensorView&, const TensorView&, const Stream&);                 \
  template void scatter_rows<T>(const RowChoice&, const TensorView&, const TensorView&, const Stream&);                \
  template void chosen_dots<T>(const RowChoice&, const TensorView&, const TensorView&, void*, const Stream&);          \
  }
