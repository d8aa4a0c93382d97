// See mbarrier.h. The barriers' state is kept here; the word in shared memory only says where they are.
#include "mbarrier.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"
#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

struct Copy {
  void* destination;
  const void* source;
  int bytes;
};
struct Mbarrier {
  int arrivals = 0;  // of a phase
  int pending = 0;   // of these, still to come
  int bytes = 0;     // expected and not yet there
  int phase = 0;
  std::vector<Copy> copies;  // under way
  std::vector<int> waiters;
  Clocks released;      // by those that arrived so far
  Clocks completed[2];  // the same when the last phase of each parity was complete
  Moment initialised;
  std::string waited_for[2];
};
std::map<uint64_t*, Mbarrier> barriers;

std::string name_of(const uint64_t* barrier) {
  return "the mbarrier at shared memory, byte " +
         std::to_string(reinterpret_cast<const unsigned char*>(barrier) - shared_memory());
}

Mbarrier& find(uint64_t* barrier, const char* what) {
  if (!is_shared(barrier) || reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t))
    fail(std::string(what) + ": an mbarrier must lie in shared memory, at a multiple of 8 bytes");
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail(std::string(what) + ": " + name_of(barrier) + " is not initialised");
  if (!comes_before_now(found->second.initialised))
    fail("race: " + std::string(what) + " uses " + name_of(barrier) + ", initialised with no barrier in between");
  check_atomic(barrier, sizeof(uint64_t));
  return found->second;
}

void complete_phase_if_ready(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.completed[b.phase] = b.released;
  b.phase ^= 1;
  b.pending = b.arrivals;
  for (int thread : b.waiters) wake(thread);
  b.waiters.clear();
}

// What is under way arrives, as nothing else is missing.
void land_copies(Mbarrier& b) {
  if (b.pending > 0 || b.copies.empty()) return;
  for (const Copy& copy : b.copies) {
    std::memcpy(copy.destination, copy.source, copy.bytes);
    end_bulk_copy(copy.destination, copy.bytes);
    b.bytes -= copy.bytes;
  }
  b.copies.clear();
  release_copies(b.released);
  complete_phase_if_ready(b);
}

}  // namespace

void reset_mbarriers() { barriers.clear(); }
bool bulk_copies_are_under_way() {
  for (const auto& [place, barrier] : barriers)
    if (!barrier.copies.empty()) return true;
  return false;
}

void initialise_mbarrier(uint64_t* barrier, int arrivals) {
  if (!is_shared(barrier) || reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t))
    fail("mbarrier.init: an mbarrier must lie in shared memory, at a multiple of 8 bytes");
  check_write(barrier, sizeof(uint64_t), "mbarrier.init");
  start_clocks();
  Mbarrier& b = barriers[barrier];
  b = Mbarrier{};
  b.arrivals = b.pending = arrivals;
  b.initialised = this_moment();
  for (int parity = 0; parity < 2; ++parity)
    b.waited_for[parity] = name_of(barrier) + ", phase of parity " + std::to_string(parity);
}

void arrive_at_mbarrier(uint64_t* barrier, int expected_bytes) {
  Mbarrier& b = find(barrier, "mbarrier.arrive");
  if (b.pending == 0)
    fail("mbarrier.arrive: more threads arrive at " + name_of(barrier) + " than it was initialised for");
  release(b.released, /*early=*/fault_here(Fault::kEarlyRelease));
  b.bytes += expected_bytes;
  --b.pending;
  complete_phase_if_ready(b);
  if (!b.waiters.empty()) land_copies(b);
}

void wait_for_mbarrier(uint64_t* barrier, int parity) {
  Mbarrier& b = find(barrier, "mbarrier.try_wait");
  if (fault_here(Fault::kWrongPhase)) parity ^= 1;
  if (b.phase == parity) land_copies(b);
  while (b.phase == parity) {
    b.waiters.push_back(current->index);
    wait_for(b.waited_for[parity].c_str());
  }
  acquire(b.completed[parity]);
}

bool test_mbarrier(uint64_t* barrier, int parity) {
  Mbarrier& b = find(barrier, "mbarrier.test_wait");
  if (b.phase == parity) return false;
  acquire(b.completed[parity]);
  return true;
}

void issue_bulk_copy(void* destination, const void* source, int bytes, uint64_t* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(destination) % 16 || reinterpret_cast<uintptr_t>(source) % 16)
    fail("cp.async.bulk: addresses and the number of bytes must be multiples of 16");
  Mbarrier& b = find(barrier, "cp.async.bulk");
  check_read(source, bytes, "cp.async.bulk");
  begin_bulk_copy(destination, bytes);
  std::memset(destination, 0xFF, bytes);
  b.copies.push_back({destination, source, bytes});
  if (!b.waiters.empty()) land_copies(b);
}

}  // namespace emulation
