// Meeting points of warps. Lanes of one warp that meet in different operations, or with different masks, are an error.
#include "collectives.h"

#include <vector>

#include "memory.h"

namespace emulation {
namespace {

struct Meeting {
  const char* operation = nullptr;
  uint32_t mask = 0;
  uint32_t arrived = 0;
  void* arguments[kWarpSize] = {};
};
std::vector<Meeting> meetings;  // one a warp

}  // namespace

void reset_collectives(int threads) { meetings.assign((threads + kWarpSize - 1) / kWarpSize, Meeting{}); }

void** arrive_at_warp(const char* operation, uint32_t mask, void* argument) {
  Meeting& meeting = meetings[current->warp];
  const uint32_t self = 1u << current->lane;
  if (threads_of_warp(current->warp) < kWarpSize) mask &= (1u << threads_of_warp(current->warp)) - 1;
  if (!(mask & self)) fail(std::string(operation) + ": called by a lane that is not in its own mask");
  if (meeting.arrived == 0) {
    meeting = Meeting{};
    meeting.operation = operation;
    meeting.mask = mask;
  }
  if (std::string(meeting.operation) != operation || meeting.mask != mask)
    fail(std::string("a warp diverges: one lane is in ") + operation + ", another in " + meeting.operation +
         (meeting.mask != mask ? " with another mask" : ""));
  meeting.arguments[current->lane] = argument;
  meeting.arrived |= self;
  if (meeting.arrived == mask) return meeting.arguments;
  wait_for(operation);
  return nullptr;
}

void release_warp() {
  Meeting& meeting = meetings[current->warp];
  const uint32_t waiting = meeting.arrived & ~(1u << current->lane);
  meeting.arrived = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (waiting >> lane & 1) wake(current->warp * kWarpSize + lane);
}

void warp_barrier(uint32_t mask) {
  if (fault_here(Fault::kSkipWarpBarrier)) return;
  char nothing = 0;
  warp_collective("__syncwarp", mask, nothing, [](char**) { order_warp(current->warp); });
}

}  // namespace emulation
