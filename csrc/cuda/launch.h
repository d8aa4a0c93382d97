// Launching a kernel, on the GPU or in the emulator. Errors become exceptions: the ops layer turns them into Torch's.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.h"
#include "kernels.h"

namespace torch_attn::cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Remembers what it has asked the driver for: to ask again at every launch takes a microsecond.
inline void raise_shared_memory_limit(const void* kernel, int bytes, int device) {
  thread_local std::map<std::pair<const void*, int>, int> limits;
  int& limit = limits[{kernel, device}];
  if (bytes <= limit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  limit = bytes;
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Stream& stream,
            const Parameters&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("the call is too large for one CUDA grid");
  constexpr size_t kDefaultLimit = 48 << 10;
  if (shared_bytes > kDefaultLimit)
    raise_shared_memory_limit(reinterpret_cast<const void*>(kernel), static_cast<int>(shared_bytes), stream.device);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(
      arguments...);
  check(cudaGetLastError(), "kernel launch");
}

// Fills memory with zeros.
inline void clear(void* memory, size_t bytes, const Stream& stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream.handle)), "cudaMemsetAsync");
}

#else

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Stream&,
            const Parameters&... arguments) {
  if (blocks > 0)
    emulation::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
                      [&] { kernel(arguments...); });
}

inline void clear(void* memory, size_t bytes, const Stream&) { std::memset(memory, 0, bytes); }

#endif

}  // namespace torch_attn::cuda
