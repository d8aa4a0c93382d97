// Runs a kernel's threads as fibers on one CPU thread: blocks one after the other, the threads of a block interleaved
// at barriers and collectives, in an order drawn from a seed. Used by cuda.h and by the runner; the kernels never see
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace emulation {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A bug in the kernel, or a misuse of an instruction: what happened, and in which block and thread.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A bug planted into a correct kernel, to test that it is noticed: every thread leaves out its nth call (from 0).
// kWrongPhase waits for an mbarrier's other phase; kEarlyRelease arrives at it, for the race check, before what the
// thread did since it last waited for one.
enum class Fault {
  kNone,
  kSkipBlockBarrier,
  kSkipWarpBarrier,
  kSkipCopyWait,
  kWrongPhase,
  kEarlyRelease,
  kSkipProductWait
};

struct Options {
  uint64_t seed = 0;  // 0: threads run in turn; otherwise a random ready thread runs next
  Fault fault = Fault::kNone;
  int fault_call = 0;
  int multiprocessors = 108;  // what the device says of itself
};
extern Options options;

struct ThreadView {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int index, lane, warp;  // index in the block
};
extern ThreadView* current;  // the thread that runs

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

// Runs body once for each thread of each block. Throws KernelError; the launch is then abandoned.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Ends the launch with an error. Never returns: the thread is not resumed.
[[noreturn]] void fail(const std::string& what);

// True once, at the call the options name, in each thread.
bool fault_here(Fault fault);

void block_barrier();
void named_barrier(int name, int threads);            // of some of the block's warps: bar.sync
void arrive_at_named_barrier(int name, int threads);  // bar.arrive: as one of them, without waiting

// Suspends the running thread until wake(index) is called; `what` is what the deadlock report says it waits for.
void wait_for(const char* what);
void wake(int thread_index);
int threads_of_warp(int warp);

}  // namespace emulation
