// CUDA for a machine without a GPU. csrc/cuda/device.h includes this in place of <cuda_runtime.h> when a plain C++
// compiler builds the kernels: the keywords, the built-in variables, and the barriers and shuffles that kernels call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "collectives.h"
#include "memory.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emulation::current->thread_index)
#define blockIdx (emulation::current->block_index)
#define blockDim (emulation::current->block_size)
#define gridDim (emulation::current->grid_size)

using emulation::dim3;

inline void __syncthreads() { emulation::block_barrier(); }

inline void __syncwarp(uint32_t mask = ~0u) { emulation::warp_barrier(mask); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::current->lane ^ lane_mask);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source_lane) {
  return emulation::shuffle("__shfl_sync", mask, value, source_lane & 31);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta) {
  const int source = emulation::current->lane + delta;
  return emulation::shuffle("__shfl_down_sync", mask, value, source < 32 ? source : emulation::current->lane);
}

inline int __any_sync(uint32_t mask, int predicate) {
  struct Argument {
    int predicate, result;
  } argument{predicate, 0};
  emulation::warp_collective("__any_sync", mask, argument, [](Argument** lanes) {
    int any = 0;
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) any |= lanes[lane] && lanes[lane]->predicate;
    for (int lane = 0; lane < emulation::kWarpSize; ++lane)
      if (lanes[lane]) lanes[lane]->result = any;
  });
  return argument.result;
}

// Blocks run one after the other and a thread is only switched at a barrier or a collective, so a plain addition is
// atomic. Atomics on one address do not race with each other.
template <class T>
__attribute__((noinline, no_sanitize_thread)) T atomicAdd(T* address, T value) {
  emulation::check_atomic(address, sizeof(T));
  const T before = *address;
  *address = before + value;
  return before;
}
