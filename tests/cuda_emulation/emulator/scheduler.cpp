// The ready queue, the block barrier and the deadlock report.
#include "scheduler.h"

#include <map>
#include <memory>
#include <vector>

#include "clocks.h"
#include "collectives.h"
#include "copies.h"
#include "fiber.h"
#include "mbarrier.h"
#include "memory.h"
#include "warpgroup.h"

namespace emulation {

Options options;
ThreadView* current = nullptr;

namespace {

struct Thread : ThreadView {
  Fiber fiber;
  const char* waits_for = "its first step";
  bool finished = false;
  int fault_calls = 0;
};

std::vector<std::unique_ptr<Thread>> threads;  // reused by every block

struct NamedBarrier {
  int arrived = 0;
  std::vector<int> waiting;    // of these
  Clocks released, completed;  // by those that arrived, and by those of the last time
};

struct Block {
  const std::function<void()>* body = nullptr;
  int size = 0;
  int running = 0;         // threads that have not finished
  std::vector<int> ready;  // a ring
  size_t first = 0, count = 0;
  std::vector<int> at_barrier;
  NamedBarrier named[16];
  uint64_t random = 1;
  std::string error;
} block;

Thread* running_thread() { return static_cast<Thread*>(current); }

uint64_t next_random() {  // xorshift64
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  block.random ^= block.random << 17;
  return block.random;
}

Thread* next_ready() {
  if (block.count == 0) return nullptr;
  const size_t size = block.ready.size();
  if (options.seed)
    std::swap(block.ready[block.first], block.ready[(block.first + next_random() % block.count) % size]);
  const int index = block.ready[block.first];
  block.first = (block.first + 1) % size;
  --block.count;
  return threads[index].get();
}

void switch_to(Thread* from, Thread* to, bool from_ends = false) {
  current = to;
  Fiber::switch_between(from ? &from->fiber : nullptr, to ? &to->fiber : nullptr, from_ends);
}

std::string block_name(const uint3& index) {
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// "warp 0: 32 lanes wait for __syncthreads; warp 1: 1 lane waits for ldmatrix, 31 lanes have finished"
std::string deadlock_report() {
  std::string report = "deadlock in " + block_name(threads[0]->block_index) + ": ";
  for (int warp = 0; warp * kWarpSize < block.size; ++warp) {
    std::map<std::string, int> lanes;
    for (int i = warp * kWarpSize; i < (warp + 1) * kWarpSize && i < block.size; ++i)
      ++lanes[threads[i]->finished ? "finished" : std::string("wait for ") + threads[i]->waits_for];
    report += (warp ? "; warp " : "warp ") + std::to_string(warp) + ":";
    for (const auto& [state, number] : lanes) report += " " + std::to_string(number) + " lanes " + state + ",";
    report.pop_back();
  }
  return report;
}

void run_next(Thread* from, bool from_ends) {
  Thread* next = next_ready();
  if (next == from && !from_ends) return;
  if (!next && block.running > 0) block.error = deadlock_report();
  switch_to(from, next, from_ends);
}

void thread_main() {
  Thread* self = running_thread();
  Fiber::entered(&self->fiber);
  (*block.body)();
  self->finished = true;
  --block.running;
  run_next(self, /*from_ends=*/true);
}

void run_block(uint3 index, dim3 size, dim3 grid) {
  for (int i = 0; i < block.size; ++i) {
    Thread& t = *threads[i];
    const unsigned u = static_cast<unsigned>(i);
    static_cast<ThreadView&>(t) = {
        {u % size.x, u / size.x % size.y, u / (size.x * size.y)}, index, size, grid, i, i % kWarpSize, i / kWarpSize};
    t.waits_for = "its first step";
    t.finished = false;
    t.fault_calls = 0;
    t.fiber.start(thread_main);
    wake(i);
  }
  Thread* first = next_ready();
  switch_to(nullptr, first);
  current = nullptr;
  if (!block.error.empty()) throw KernelError(block.error);
  if (bulk_copies_are_under_way())
    throw KernelError(block_name(index) + " ends while a bulk copy into its shared memory is under way");
}

}  // namespace

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  if (count == 0 || count > kMaxThreads) throw KernelError("launch: " + std::to_string(count) + " threads in a block");
  while (static_cast<int>(threads.size()) < count) threads.push_back(std::make_unique<Thread>());
  start_launch();
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block = Block{};
        block.body = &body;
        block.size = block.running = count;
        block.ready.resize(count);
        block.random = (options.seed + 1) * 0x9E3779B97F4A7C15ull ^ (x * 7919ull + y * 104729ull + z * 1299709ull);
        start_block(shared_bytes);
        reset_collectives(count);
        reset_copies(count);
        reset_products(count);
        reset_clocks(count);
        reset_mbarriers();
        run_block({x, y, z}, size, grid);
      }
}

void fail(const std::string& what) {
  Thread* self = running_thread();
  block.error = what + " [" + block_name(self->block_index) + ", warp " + std::to_string(self->warp) + ", lane " +
                std::to_string(self->lane) + "]";
  switch_to(self, nullptr, /*from_ends=*/true);
  __builtin_unreachable();
}

bool fault_here(Fault fault) { return options.fault == fault && running_thread()->fault_calls++ == options.fault_call; }

void wait_for(const char* what) {
  Thread* self = running_thread();
  self->waits_for = what;
  run_next(self, /*from_ends=*/false);
  current = self;
}

void wake(int index) {
  block.ready[(block.first + block.count) % block.ready.size()] = index;
  ++block.count;
}

int threads_of_warp(int warp) {
  const int rest = block.size - warp * kWarpSize;
  return rest < kWarpSize ? rest : kWarpSize;
}

void block_barrier() {
  if (fault_here(Fault::kSkipBlockBarrier)) return;
  block.at_barrier.push_back(current->index);
  if (static_cast<int>(block.at_barrier.size()) == block.size) {
    order_block();
    for (int index : block.at_barrier) wake(index);
    block.at_barrier.clear();
  }
  wait_for("__syncthreads");
}

static NamedBarrier& arrive(int name, int thread_count, bool waits) {
  if (name < 1 || name > 15 || thread_count % kWarpSize) fail("bar: a number from 1 to 15, and whole warps");
  start_clocks();
  NamedBarrier& barrier = block.named[name];
  release(barrier.released, /*early=*/false);
  if (waits) barrier.waiting.push_back(current->index);
  if (++barrier.arrived < thread_count) return barrier;
  barrier.arrived = 0;
  barrier.completed = std::move(barrier.released);
  barrier.released.clear();
  for (int index : barrier.waiting) wake(index);
  barrier.waiting.clear();
  return barrier;
}

void named_barrier(int name, int thread_count) {
  if (fault_here(Fault::kSkipBlockBarrier)) return;
  NamedBarrier& barrier = arrive(name, thread_count, /*waits=*/true);
  wait_for("a named barrier");
  acquire(barrier.completed);
}

void arrive_at_named_barrier(int name, int thread_count) {
  if (!fault_here(Fault::kSkipBlockBarrier)) arrive(name, thread_count, /*waits=*/false);
}

}  // namespace emulation
