#include "../select_keys.cuh"

namespace torch_attn::cuda::sm80 {
template void select_keys<Float16, 64>(const AttentionProblem&, const Selection&, const SelectionOutputs&, void*,
                                       const Stream&);
template void select_keys<Float16, 128>(const AttentionProblem&, const Selection&, const SelectionOutputs&, void*,
                                        const Stream&);
}  // namespace torch_attn::cuda::sm80
