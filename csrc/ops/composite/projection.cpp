// torch_attn::projection as at::linear, and its derivative in PyTorch's operators: compilers, vmap, autocast, devices
// other than the CPU, and second derivatives.
#include "ops/projection.h"

#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "ops/outputs.h"

namespace torch_attn::ops {
namespace composite {

ProjectionGradients projection_backward(const ProjectionBackwardArguments& a) {
  const auto rows_of = [](const Tensor& t) { return t.reshape_symint({-1, t.sym_size(-1)}); };
  const auto& [for_input, for_weight, for_bias] = a.output_mask;
  TORCH_CHECK(
      a.grad_out.dim() >= 2 && (!for_input || is_defined(a.weight)) && (!for_weight || is_defined(a.input)),
      "projection_backward: grad_out must have two dimensions or more; the gradient of input takes weight, that "
      "of weight takes input.");
  return {for_input ? at::matmul(a.grad_out, *a.weight) : no_gradient(a.grad_out),
          for_weight ? at::mm(rows_of(a.grad_out).t(), rows_of(*a.input)) : no_gradient(a.grad_out),
          for_bias ? rows_of(a.grad_out).sum(0) : no_gradient(a.grad_out)};
}

}  // namespace composite

TORCH_LIBRARY_IMPL(torch_attn, CompositeImplicitAutograd, m) {
  m.impl("projection", Projection::kernel<composite::projection>);
  m.impl("projection_backward", ProjectionBackward::kernel<composite::projection_backward>);
}
TORCH_LIBRARY_IMPL(torch_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("projection", Projection::kernel<composite::projection>);
  m.impl("projection_backward", ProjectionBackward::kernel<composite::projection_backward>);
}
// at::linear has autocast's rule; below it, the kernel would take what autocast wants to have cast.
TORCH_LIBRARY_IMPL(torch_attn, AutocastCPU, m) { m.impl("projection", Projection::kernel<composite::projection>); }

}  // namespace torch_attn::ops
