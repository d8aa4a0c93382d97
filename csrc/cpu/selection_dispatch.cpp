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

}  // namespace torch_attn::cpu
