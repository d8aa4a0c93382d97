// Small kernels, each with one bug (or none), for test_emulator.py: the emulator must find the bug and name it. Their
// number is the order of kKernels.
#include "cuda/ptx.cuh"
#include "faulty_kernels.h"

namespace torch_attn::cuda::faulty {
namespace {

constexpr int kThreads = 64;

// Every thread reads what its neighbour wrote, and then overwrites its own place.
__global__ void exchange(float* out, bool barrier_before_read, bool barrier_before_overwrite) {
  TA_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = static_cast<float>(i);
  if (barrier_before_read) __syncthreads();
  const float neighbour = shared[(i + 1) % kThreads];
  if (barrier_before_overwrite) __syncthreads();
  shared[i] = neighbour;
  out[i] = neighbour;
}

// The same inside each warp.
__global__ void exchange_in_warp(float* out, bool barrier) {
  TA_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = static_cast<float>(i);
  if (barrier) __syncwarp();
  out[i] = shared[i ^ 1];
}

__global__ void copy_through_shared(const float* in, float* out, bool wait, bool barrier, bool early_overwrite) {
  TA_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  if (i < kThreads / 4) ptx::cp_async_16(shared + 4 * i, in + 4 * i, true);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  if (barrier) __syncthreads();
  out[i] = shared[kThreads - 1 - i];
  if (!early_overwrite) __syncthreads();
  if (i < kThreads / 4) ptx::cp_async_16(shared + 4 * i, in, true);  // the next stage, into the same buffer
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void misaligned_copy(const float* in) {
  TA_DYNAMIC_SHARED(memory);
  ptx::cp_async_16(memory, in + 1, true);
}

__global__ void access(float* out, const float* in, int64_t shared_index, int64_t out_index, int64_t in_index) {
  TA_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  if (threadIdx.x != 0) return;
  shared[shared_index] = in[in_index];
  out[out_index] = shared[shared_index];
}

__global__ void write_input(const float* in) { const_cast<float*>(in)[threadIdx.x] = 0; }

__global__ void read_unwritten(float* out) {
  TA_DYNAMIC_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

__global__ void divergent_barrier() {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void divergent_collective(float* out) {
  float x = 0;
  if (threadIdx.x % 32 < 16)
    x = __shfl_xor_sync(~0u, 1.0f, 1);
  else
    __syncwarp();
  out[threadIdx.x] = x;
}

__global__ void blocks_race(float* out, bool atomic) {
  if (atomic)
    atomicAdd(out, 1.0f);
  else if (threadIdx.x == 0)
    *out += 1.0f;
}

struct Kernel {
  const char* name;
  void (*body)(float* out, const float* in);
  unsigned blocks = 1;
};

constexpr Kernel kKernels[] = {
    {"exchange", [](float* out, const float*) { exchange(out, true, true); }},
    {"exchange without barrier before reading", [](float* out, const float*) { exchange(out, false, true); }},
    {"exchange without barrier before overwriting", [](float* out, const float*) { exchange(out, true, false); }},
    {"exchange in warp", [](float* out, const float*) { exchange_in_warp(out, true); }},
    {"exchange in warp without barrier", [](float* out, const float*) { exchange_in_warp(out, false); }},
    {"copy", [](float* out, const float* in) { copy_through_shared(in, out, true, true, false); }},
    {"copy without wait", [](float* out, const float* in) { copy_through_shared(in, out, false, true, false); }},
    {"copy without barrier", [](float* out, const float* in) { copy_through_shared(in, out, true, false, false); }},
    {"copy with early release", [](float* out, const float* in) { copy_through_shared(in, out, true, true, true); }},
    {"misaligned copy", [](float*, const float* in) { misaligned_copy(in); }},
    {"access", [](float* out, const float* in) { access(out, in, 63, 63, 63); }},
    {"shared memory out of bounds", [](float* out, const float* in) { access(out, in, 64, 0, 0); }},
    {"store out of bounds", [](float* out, const float* in) { access(out, in, 0, 64, 0); }},
    {"load out of bounds", [](float* out, const float* in) { access(out, in, 0, 0, -1); }},
    {"store to an input", [](float*, const float* in) { write_input(in); }},
    {"read of unwritten shared memory", [](float* out, const float*) { read_unwritten(out); }},
    {"divergent barrier", [](float*, const float*) { divergent_barrier(); }},
    {"divergent collective", [](float* out, const float*) { divergent_collective(out); }},
    {"blocks add with atomics", [](float* out, const float*) { blocks_race(out, true); }, 2},
    {"blocks add without atomics", [](float* out, const float*) { blocks_race(out, false); }, 2},
};

}  // namespace

const char* name(int kernel) {
  return kernel < static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0])) ? kKernels[kernel].name : nullptr;
}

void run(int kernel, float* out, const float* in) {
  emulation::launch(kKernels[kernel].blocks, kThreads, kThreads * sizeof(float),
                    [&] { kKernels[kernel].body(out, in); });
}

}  // namespace torch_attn::cuda::faulty
