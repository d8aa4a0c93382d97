// The memory of the emulated device: a heap for tensors and the shared memory of the running block. Every access of a
// kernel is checked (instrumentation.cpp reports the plain ones, ptx.cuh's host versions report their own):
//   bounds    it lies inside one allocation, and does not write to one that is read-only;
//   races     no other thread wrote the place (or, for a write, read it) without a barrier in between;
//   order     shared memory was written before it is read, and no copy into it is still under way.
//
// A race is found whatever order the threads ran in. Two accesses are ordered when a __syncthreads lies between them,
// or, inside one warp, a __syncwarp, or where mbarriers order them (clocks.h); blocks of one launch are never ordered.
// Shuffles order nothing, as on hardware.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

// granule: the smallest unit that different threads write separately, for instance a tensor's element size.
void* allocate(size_t bytes, size_t granule);
void set_read_only(void* memory, bool read_only);
void free_all();

unsigned char* shared_memory();
bool is_shared(const void* address);
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kSharedGranule = 4;

void check_read(const void* address, size_t bytes, const char* what);
void check_write(const void* address, size_t bytes, const char* what);
void check_atomic(const void* address, size_t bytes);

// An asynchronous copy by the running thread: between the two calls, nobody may touch the destination.
void begin_copy_to_shared(void* destination, size_t bytes);
void end_copy_to_shared(void* destination, size_t bytes);
// The same of a bulk copy, which the copy engine makes: whoever acquires from its mbarrier may read it.
void begin_bulk_copy(void* destination, size_t bytes);
void end_bulk_copy(void* destination, size_t bytes);

// A moment in a thread's life, and whether it comes before what the running thread does now.
struct Moment {
  int thread = 0;
  uint32_t clock = 0, block_time = 0, warp_time = 0;
};
Moment this_moment();
bool comes_before_now(const Moment& moment);

// Called by the scheduler.
void start_launch();
void start_block(size_t shared_bytes);
void order_block();
void order_warp(int warp);

}  // namespace emulation
