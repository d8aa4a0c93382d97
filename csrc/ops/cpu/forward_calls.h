// The count that the op kernel_calls returns, by which a test proves that an output came from these kernels. Included
// by the operators whose kernels compute attention's output.
#pragma once

#include <atomic>
#include <cstdint>

namespace torch_attn::ops {

inline std::atomic<int64_t> forward_calls{0};

inline void count_forward_call() { forward_calls.fetch_add(1, std::memory_order_relaxed); }

}  // namespace torch_attn::ops
