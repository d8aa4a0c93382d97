// What the threads of one warp do together: shuffles, __syncwarp and, through warp_collective, the matrix instructions
// of csrc/cuda/ptx.cuh. The last lane to arrive does the work for all.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace emulation {

// Returns every lane's argument (null for lanes outside the mask) to the lane that arrives last, which must then call
// release_warp(); the others get null once it has.
void** arrive_at_warp(const char* operation, uint32_t mask, void* argument);
void release_warp();

template <class Argument, class Function>
void warp_collective(const char* operation, uint32_t mask, Argument& argument, Function&& function) {
  if (void** lanes = arrive_at_warp(operation, mask, &argument)) {
    function(reinterpret_cast<Argument**>(lanes));
    release_warp();
  }
}

template <class T>
T shuffle(const char* operation, uint32_t mask, T value, int source_lane) {
  struct Argument {
    T value;
    int source_lane;
    T result;
  } argument{value, source_lane, value};
  warp_collective(operation, mask, argument, [operation](Argument** lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!lanes[lane]) continue;
      const Argument* source = lanes[lanes[lane]->source_lane];
      if (!source)
        fail(std::string(operation) + ": reads lane " + std::to_string(lanes[lane]->source_lane) +
             ", which is not in the mask");
      lanes[lane]->result = source->value;
    }
  });
  return argument.result;
}

void warp_barrier(uint32_t mask);

void reset_collectives(int threads);  // at the start of a block

}  // namespace emulation
