// Included first by every file that holds device code: nvcc gets the CUDA runtime; a plain C++ compiler gets the
// emulator of tests/cuda_emulation, which runs the same file on the CPU.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define TA_DEVICE __device__ __forceinline__
// Names the block's dynamic shared memory, aligned as wgmma's operands are. Only one name may be used in a translation
// unit.
#define TA_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#else

#include "emulator/cuda.h"

#define TA_DEVICE inline __attribute__((always_inline))
#define TA_DYNAMIC_SHARED(name) unsigned char* const name = emulation::shared_memory()

#endif
