// Small kernels, each with one bug (or none), for test_emulator.py: the emulator must find the bug and name it. Their
// number is the order of kKernels.
#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"
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

// The same between two warps, by a barrier that has a name.
__global__ void exchange_between_warps(float* out, bool barrier, int threads) {
  TA_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = static_cast<float>(i);
  if (barrier) ptx::barrier_sync(1, threads);
  out[i] = shared[i ^ 32];
}

// A copy of whose end others are told before it is waited for.
__global__ void copy_told_too_early(const float* in, float* out, bool early) {
  TA_DYNAMIC_SHARED(memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory);
  float* const tile = reinterpret_cast<float*>(full + 4);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_16(tile, in, true);
    ptx::cp_async_commit();
    if (early) ptx::mbarrier_arrive(full);
    ptx::cp_async_wait<0>();
    if (!early) ptx::mbarrier_arrive(full);
  } else if (threadIdx.x >= 32) {
    ptx::mbarrier_wait(full, 0);
    out[threadIdx.x] = tile[threadIdx.x % 4];
  }
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

// What can be wrong with pipeline().
struct PipelineFaults {
  bool no_barrier_after_init = false;
  bool producer_does_not_wait = false, consumers_do_not_wait = false, consumers_wait_for_wrong_phase = false;
  bool release_before_reading = false, no_release = false, no_barrier_in_warp = false;
  int missing_bytes = 0, missing_arrivals = 0;
  bool generic_stores = false;  // not a fault: the producer stores what it could copy
};

// The first warp brings tiles into a ring of buffers, the second sums them up, in a way that tells their order: a full
// and an empty barrier for each buffer.
__global__ void pipeline(float* out, const float* in, PipelineFaults faults) {
  constexpr int kBuffers = 2, kSteps = 8, kTile = 32, kTileOffset = 4;
  TA_DYNAMIC_SHARED(memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory);
  uint64_t* const empty = full + kBuffers;
  float* const tiles = reinterpret_cast<float*>(empty + kBuffers);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBuffers; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 1 - faults.missing_arrivals);
    }
    ptx::mbarrier_init_fence();
  }
  if (!faults.no_barrier_after_init) __syncthreads();
  if (threadIdx.x < 32) {
    for (int step = 0; step < kSteps; ++step) {
      const int buffer = step % kBuffers, round = step / kBuffers;
      float* const tile = tiles + buffer * kTile;
      // In the first round there is nothing to wait for: the phase before the first has parity 1.
      if (!faults.producer_does_not_wait) ptx::mbarrier_wait(empty + buffer, (round + 1) % 2);
      if (faults.generic_stores) {
        tile[lane] = in[step * kTileOffset + lane];
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(full + buffer);
      } else if (lane == 0) {
        constexpr int kBytes = kTile * sizeof(float);
        ptx::mbarrier_arrive_expect_tx(full + buffer, kBytes - faults.missing_bytes);
        ptx::cp_async_bulk(tile, in + step * kTileOffset, kBytes, full + buffer);
      }
    }
  } else {
    float sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      const int buffer = step % kBuffers, parity = (step / kBuffers + faults.consumers_wait_for_wrong_phase) % 2;
      if (!faults.consumers_do_not_wait) ptx::mbarrier_wait(full + buffer, parity);
      if (faults.release_before_reading && lane == 0) ptx::mbarrier_arrive(empty + buffer);
      sum = 2 * sum + tiles[buffer * kTile + (lane + 1) % 32];
      if (!faults.no_barrier_in_warp) __syncwarp();
      if (!faults.release_before_reading && !faults.no_release && lane == 0) ptx::mbarrier_arrive(empty + buffer);
    }
    out[lane] = sum;
  }
}

PipelineFaults generic_stores() {
  PipelineFaults faults;
  faults.generic_stores = true;
  return faults;
}
template <class Value>
PipelineFaults with(Value PipelineFaults::* fault, Value value, bool stores = false) {
  PipelineFaults faults;
  faults.generic_stores = stores;
  faults.*fault = value;
  return faults;
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
    {"exchange between warps", [](float* out, const float*) { exchange_between_warps(out, true, kThreads); }},
    {"exchange between warps without barrier",
     [](float* out, const float*) { exchange_between_warps(out, false, kThreads); }},
    {"exchange between warps with a barrier of one",
     [](float* out, const float*) { exchange_between_warps(out, true, kThreads / 2); }},
    {"pipeline of a copy", [](float* out, const float* in) { copy_told_too_early(in, out, false); }},
    {"pipeline of a copy that is told too early",
     [](float* out, const float* in) { copy_told_too_early(in, out, true); }},
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
    {"pipeline", [](float* out, const float* in) { pipeline(out, in, {}); }},
    {"pipeline of stores", [](float* out, const float* in) { pipeline(out, in, generic_stores()); }},
    {"pipeline without barrier after init",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::no_barrier_after_init, true)); }},
    {"pipeline whose producer does not wait",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::producer_does_not_wait, true)); }},
    {"pipeline of stores whose producer does not wait",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::producer_does_not_wait, true, true)); }},
    {"pipeline whose consumers do not wait",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::consumers_do_not_wait, true)); }},
    {"pipeline with wrong phase",
     [](float* out, const float* in) {
       pipeline(out, in, with(&PipelineFaults::consumers_wait_for_wrong_phase, true));
     }},
    {"pipeline with early release",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::release_before_reading, true)); }},
    {"pipeline of stores with early release",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::release_before_reading, true, true)); }},
    {"pipeline without barrier in warp before release",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::no_barrier_in_warp, true)); }},
    {"pipeline without release",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::no_release, true)); }},
    {"pipeline that expects too few bytes",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::missing_bytes, 16)); }},
    {"pipeline with too many arrivals",
     [](float* out, const float* in) { pipeline(out, in, with(&PipelineFaults::missing_arrivals, 1)); }},
    {"blocks add with atomics", [](float* out, const float*) { blocks_race(out, true); }, 2},
    {"blocks add without atomics", [](float* out, const float*) { blocks_race(out, false); }, 2},
};

}  // namespace

const char* name(int kernel) {
  return kernel < static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0])) ? kKernels[kernel].name : nullptr;
}

void run(int kernel, float* out, const float* in) {
  constexpr size_t kSharedBytes = kThreads * sizeof(float);
  // A pipeline's barriers come before its buffers.
  const bool has_barriers = std::string(kKernels[kernel].name).rfind("pipeline", 0) == 0;
  emulation::launch(kKernels[kernel].blocks, kThreads, kSharedBytes + (has_barriers ? 4 * sizeof(uint64_t) : 0),
                    [&] { kKernels[kernel].body(out, in); });
}

}  // namespace torch_attn::cuda::faulty
