// Included by every header in core/: what lets g++, nvcc and the CUDA emulator compile the same definitions.
#pragma once

#if defined(__CUDACC__)
#define TA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TA_HOST_DEVICE inline __attribute__((always_inline))
#endif
