#include "device_info.h"

#include <array>
#include <atomic>

#include "launch.h"

namespace torch_attn::cuda {

#if defined(__CUDACC__)

void set_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

int compute_capability(int device) {
  constexpr int kCached = 64;
  static std::array<std::atomic<int>, kCached> cache{};
  if (device < kCached && cache[device] != 0) return cache[device];
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (device < kCached) cache[device] = 10 * major + minor;
  return 10 * major + minor;
}

#else

void set_device(int) {}
int compute_capability(int) { return 80; }

#endif

}  // namespace torch_attn::cuda
