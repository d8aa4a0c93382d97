// What each thread of a block knows of the others' past (vector clocks; Lamport 1978, Mattern 1989), for orders that
// the barriers of a block and of a warp do not make: those of mbarriers. Used by memory.cpp's race check; off, and
// free, until a block initialises its first mbarrier.
//
// A thread's clock moves on whenever others may learn of it. An access at clock c of thread t comes before what thread
// u does now if u knows of t's clock c. Copies are made by one more thread, the copy engine.
#pragma once

#include <cstdint>
#include <vector>

namespace emulation {

using Clocks = std::vector<uint32_t>;  // of each thread of the block, and of the copy engine; empty: nothing known

void start_clocks();
void reset_clocks(int threads);  // at the start of a block: off
bool clocks_are_on();

uint32_t clock_of(int thread);
bool knows(int thread, int other, uint32_t clock);
int copy_engine();  // its place in Clocks

// The running thread makes what it did and knows known to those that acquire from `to`; early: only what it did and
// knew when it last acquired.
void release(Clocks& to, bool early);
void acquire(const Clocks& from);
void release_copies(Clocks& to);   // by the copy engine
void order_warp_clocks(int warp);  // __syncwarp

}  // namespace emulation
