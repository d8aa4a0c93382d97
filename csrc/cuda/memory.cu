// What operators do with a GPU's memory beside calling kernels.
#include "device_info.h"
#include "kernels.h"
#include "launch.h"

namespace torch_attn::cuda {

void set_zero(void* memory, size_t bytes, const Stream& stream) {
  set_device(stream.device);
  clear(memory, bytes, stream);
}

}  // namespace torch_attn::cuda
