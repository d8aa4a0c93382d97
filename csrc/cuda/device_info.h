// The few questions that dispatch.cpp asks of the CUDA runtime.
#pragma once

namespace torch_attn::cuda {

// What the choice of a kernel depends on.
struct DeviceFacts {
  int compute_capability = 80;  // 80 for sm_80
  int multiprocessors = 108;
};

// Makes the device current for this thread in the CUDA runtime that this library carries; PyTorch has one of its own.
void set_device(int device);
// Asked of the driver once a device.
DeviceFacts device_facts(int device);

}  // namespace torch_attn::cuda
