// Where a CUDA operator runs. Needs no CUDA header and no CUDA build of PyTorch: the stream and the device come from
// c10's virtual guard. Included by the files beside it.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/kernels.h"
#include "ops/arguments.h"

namespace torch_attn::ops {

// PyTorch's current stream on the tensor's device: what a captured CUDA graph records, too.
inline cuda::Stream current_stream(const Tensor& tensor) {
  const c10::Device device = tensor.device();
  return {device.index(), c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
}

// Scratch memory for a kernel.
inline Tensor workspace_of(size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace torch_attn::ops
