#include "device_info.h"

#include <array>
#include <atomic>

#include "launch.h"

namespace torch_attn::cuda {

#if defined(__CUDACC__)

void set_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

DeviceFacts device_facts(int device) {
  constexpr int kCached = 64, kUnit = 1000;
  static std::array<std::atomic<int>, kCached> cache{};  // kUnit · multiprocessors + compute capability
  int facts = device < kCached ? cache[device].load() : 0;
  if (facts == 0) {
    const auto attribute = [device](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
      return value;
    };
    facts = kUnit * attribute(cudaDevAttrMultiProcessorCount) + 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
            attribute(cudaDevAttrComputeCapabilityMinor);
    if (device < kCached) cache[device] = facts;
  }
  return {facts % kUnit, facts / kUnit};
}

#else

void set_device(int) {}
DeviceFacts device_facts(int) { return {90, emulation::options.multiprocessors}; }

#endif

}  // namespace torch_attn::cuda
