// The few questions that dispatch.cpp asks of the CUDA runtime.
#pragma once

namespace torch_attn::cuda {

// Makes the device current for this thread in the CUDA runtime that this library carries; PyTorch has one of its own.
void set_device(int device);
// 80 for sm_80. Asked of the driver once a device.
int compute_capability(int device);

}  // namespace torch_attn::cuda
