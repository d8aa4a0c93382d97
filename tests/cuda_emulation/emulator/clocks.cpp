// See clocks.h.
#include "clocks.h"

#include <algorithm>

#include "scheduler.h"

namespace emulation {
namespace {

int thread_count = 0;
bool on = false;
std::vector<Clocks> known;          // by each thread; its own entry is its clock
std::vector<Clocks> when_acquired;  // the same when it last acquired

void merge(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

void reset_clocks(int threads) {
  on = false;
  thread_count = threads;
}

void start_clocks() {
  if (on) return;
  on = true;
  known.assign(thread_count + 1, Clocks(thread_count + 1));
  for (int i = 0; i <= thread_count; ++i) known[i][i] = 1;
  when_acquired.assign(thread_count, Clocks(thread_count + 1));
}

bool clocks_are_on() { return on; }
int copy_engine() { return thread_count; }
uint32_t clock_of(int thread) { return on ? known[thread][thread] : 1; }
bool knows(int thread, int other, uint32_t clock) { return on && known[thread][other] >= clock; }

void release(Clocks& to, bool early) {
  const int self = current->index;
  merge(to, early ? when_acquired[self] : known[self]);
  ++known[self][self];
}

void acquire(const Clocks& from) {
  const int self = current->index;
  merge(known[self], from);
  when_acquired[self] = known[self];
  ++known[self][self];
}

void release_copies(Clocks& to) {
  merge(to, known[copy_engine()]);
  ++known[copy_engine()][copy_engine()];
}

void order_warp_clocks(int warp) {
  if (!on) return;
  Clocks all;
  const int first = warp * kWarpSize, end = std::min(first + kWarpSize, thread_count);
  for (int i = first; i < end; ++i) merge(all, known[i]);
  for (int i = first; i < end; ++i) {
    known[i] = all;
    ++known[i][i];
  }
}

}  // namespace emulation
