// See copies.h. One queue of groups a thread.
#include "copies.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

struct Copy {
  void* destination;
  const void* source;
  int bytes, valid_bytes;
};
struct Queue {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
std::vector<Queue> queues;

}  // namespace

void reset_copies(int threads) { queues.assign(threads, Queue{}); }

void issue_copy(void* destination, const void* source, int bytes, int valid_bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % bytes || (valid_bytes && reinterpret_cast<uintptr_t>(source) % bytes))
    fail("cp.async: addresses must be multiples of the " + std::to_string(bytes) + " bytes it copies");
  if (valid_bytes) check_read(source, valid_bytes, "cp.async");
  begin_copy_to_shared(destination, bytes);
  std::memset(destination, 0xFF, bytes);
  queues[current->index].open.push_back({destination, source, bytes, valid_bytes});
}

void commit_copies() {
  Queue& queue = queues[current->index];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void wait_for_copies(int groups_left) {
  if (fault_here(Fault::kSkipCopyWait)) return;
  Queue& queue = queues[current->index];
  while (static_cast<int>(queue.groups.size()) > groups_left) {
    for (const Copy& copy : queue.groups.front()) {
      std::memcpy(copy.destination, copy.source, copy.valid_bytes);
      std::memset(static_cast<char*>(copy.destination) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
      end_copy_to_shared(copy.destination, copy.bytes);
    }
    queue.groups.pop_front();
  }
}

}  // namespace emulation
