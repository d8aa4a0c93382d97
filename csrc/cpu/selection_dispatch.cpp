// The functions of selection_kernels.h: the ISA's choice.
#include "selection_kernels.h"

namespace torch_attn::cpu {
namespace {

const SelectionTable& active_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kAvx2Selection;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
      return kAvx512Selection;
#endif
    default:
      return kBaselineSelection;
  }
}

}  // namespace

void select_keys(const AttentionProblem& problem, const Selection& selection, const SelectionOutputs& outputs,
                 const Parallel& parallel) {
  active_kernels().select(problem, selection, outputs, parallel);
}

void select_keys_backward(const AttentionProblem& problem, const SelectionBackwardTensors& tensors,
                          const Parallel& parallel) {
  active_kernels().backward(problem, tensors, parallel);
}

void gather_rows(const RowChoice& choice, const TensorView& source, const TensorView& out, const Parallel& parallel) {
  active_kernels().gather(choice, source, out, parallel);
}

void scatter_rows(const RowChoice& choice, const TensorView& rows, const TensorView& out, const Parallel& parallel) {
  active_kernels().scatter(choice, rows, out, parallel);
}

void chosen_dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* dots,
                 const Parallel& parallel) {
  active_kernels().dots(choice, rows, source, dots, parallel);
}

}  // namespace torch_attn::cpu
