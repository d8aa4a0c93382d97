// Where a CUDA operator runs. Needs no CUDA header and no CUDA build of PyTorch: the stream and the device come from
// c10's virtual guard. Included by the files beside it.
#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/kernels.h"
#include "ops/arguments.h"

namespace torch_attn::ops {

// PyTorch's current stream on the tensor's device: what a captured CUDA graph records, too.
inline cuda::Stream current_stream(const Tensor& tensor) {
  const c10::Device device = tensor.device();
  return {device.index(), c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
}

}  // namespace torch_attn::ops
