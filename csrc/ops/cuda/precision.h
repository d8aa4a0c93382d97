// Whether float32 products may be of TF32: what PyTorch's user has asked of matrix products on CUDA is asked of these,
// too. Included by this folder.
#pragma once

#include <ATen/Context.h>

#include "core/problem.h"

namespace torch_attn::ops {

// torch.backends.cuda.matmul.allow_tf32 and fp32_precision, torch.set_float32_matmul_precision and what else sets it.
inline AttentionProblem with_precision_of_matmul(AttentionProblem p) {
  p.allow_tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                 at::Float32Precision::TF32;
  return p;
}

}  // namespace torch_attn::ops
