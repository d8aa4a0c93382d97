// Launching a kernel, on the GPU or in the emulator. Errors become exceptions: the ops layer turns them into Torch's.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "kernels.h"

namespace torch_attn::cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Stream& stream,
            const Parameters&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("the call is too large for one CUDA grid");
  constexpr size_t kDefaultLimit = 48 << 10;
  if (shared_bytes > kDefaultLimit)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
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
