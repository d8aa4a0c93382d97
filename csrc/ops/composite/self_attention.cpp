// torch_attn::self_attention by torch_attn::attention, where no kernel writes the three gradients as one tensor:
// without gradients, under vmap, and on devices other than the CPU and CUDA.
#include "ops/self_attention.h"

namespace torch_attn::ops {

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) {
  m.impl("self_attention", SelfAttention::kernel<composite::self_attention>);
}
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("self_attention", SelfAttention::kernel<composite::self_attention>);
  m.impl("self_attention_backward", SelfAttentionBackward::kernel<composite::self_attention_backward>);
}

}  // namespace torch_attn::ops
