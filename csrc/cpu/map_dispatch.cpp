// The functions of map_kernels.h: the choice of the instruction set.
#include "map_kernels.h"

namespace torch_attn::cpu {
namespace {

const MapKernelTable& active_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kAvx2MapKernels;
    case Isa::kAvx512:
      return kAvx512MapKernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16MapKernels;
    case Isa::kAmx:
      return kAmxMapKernels;
#endif
    default:
      return kBaselineMapKernels;
  }
}

}  // namespace

void attention_statistics(const AttentionProblem& problem, const StatisticsOutputs& outputs, const Parallel& parallel) {
  active_kernels().statistics(problem, outputs, parallel);
}

void attention_weights(const AttentionProblem& problem, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  active_kernels().weights(problem, outputs, parallel);
}

void attention_map_backward(const AttentionProblem& problem, const MapBackwardTensors& tensors,
                            const Parallel& parallel) {
  active_kernels().backward(problem, tensors, parallel);
}

}  // namespace torch_attn::cpu
