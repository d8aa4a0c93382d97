// cp.async: a thread issues copies into shared memory, groups them, and waits for all but the last n groups. A copy
// lands as late as the program allows, and its destination holds NaN until then. Used by csrc/cuda/ptx.cuh's host
// versions.
#pragma once

namespace emulation {

void issue_copy(void* destination, const void* source, int bytes, int valid_bytes);  // the rest is filled with zeros
void commit_copies();
void wait_for_copies(int groups_left);

void reset_copies(int threads);  // at the start of a block

}  // namespace emulation
