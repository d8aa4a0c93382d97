#include "../forward.cuh"

namespace torch_attn::cuda::sm90 {
template void forward<BFloat16, 64>(const AttentionProblem&, const ForwardOutputs&, const Stream&);
template void forward<BFloat16, 128>(const AttentionProblem&, const ForwardOutputs&, const Stream&);
}  // namespace torch_attn::cuda::sm90
