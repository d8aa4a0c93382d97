// mbarriers, and the bulk copies that complete them. A copy lands as late as the program allows, when its barrier lacks
// nothing else and a thread waits; its destination holds NaN until then. Used by csrc/cuda/ptx_sm90.cuh's host
// versions.
#pragma once

#include <cstdint>

namespace emulation {

void initialise_mbarrier(uint64_t* barrier, int arrivals);
void arrive_at_mbarrier(uint64_t* barrier, int expected_bytes);
void wait_for_mbarrier(uint64_t* barrier, int parity);
bool test_mbarrier(uint64_t* barrier, int parity);  // whether a wait would return at once; then it is one
void issue_bulk_copy(void* destination, const void* source, int bytes, uint64_t* barrier);

void reset_mbarriers();  // at the start of a block
bool bulk_copies_are_under_way();

}  // namespace emulation
