// Allocation, bounds and the race check. Each granule of memory remembers its last writer and its last readers, with
// the time of each; time moves on at every barrier.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "clocks.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
constexpr bool kLoadsAndStoresAreReported = false;  // only what goes through a wrapper of ptx.cuh and atomics
#else
constexpr bool kLoadsAndStoresAreReported = true;
#define __asan_poison_memory_region(address, bytes)
#define __asan_unpoison_memory_region(address, bytes)
#endif

namespace emulation {
namespace {

constexpr size_t kHeapBytes = size_t{1} << 30;
constexpr size_t kPage = 256;  // allocations start on a page and are followed by at least one free page
constexpr uint16_t kManyReaders = 0xFFFF, kManyInWarp = 0x8000;

// When something happened: the number of block barriers so far, over all blocks and launches, and of the warp's own.
struct Time {
  uint32_t block = 0;
  uint32_t warp = 0;
};
struct Granule {
  Time written, read;
  uint16_t writer = 0;
  uint32_t write_clock = 0;  // of the writer, see clocks.h
  uint16_t reader = 0;       // a thread; or several of a warp (kManyInWarp | warp); or kManyReaders
  bool copying = false;      // an asynchronous copy is on its way here
  bool atomic = false;       // the last write was atomic
};

// One reader of a granule of shared memory, where clocks are on.
struct Read {
  int thread;
  uint32_t clock;
  Time time;
};

struct Region {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  size_t granule = 4;
  bool read_only = false;
  std::unique_ptr<Granule[]> granules;
};

unsigned char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  __asan_poison_memory_region(memory, bytes);
  return static_cast<unsigned char*>(memory);
}

struct Heap {
  unsigned char* begin = reserve(kHeapBytes);
  size_t used = kPage;
  std::vector<Region> regions;
  std::vector<uint32_t> region_of_page = std::vector<uint32_t>(kHeapBytes / kPage);  // 0: none, otherwise index + 1
} heap;

struct Shared : Region {
  Shared() {
    begin = reserve(2 * kMaxSharedBytes);
    granule = kSharedGranule;
    granules = std::make_unique<Granule[]>(kMaxSharedBytes / kSharedGranule);
  }
  std::vector<std::vector<Read>> reads = std::vector<std::vector<Read>>(kMaxSharedBytes / kSharedGranule);
} shared;

uint32_t launch_start = 1, block_start = 1, now = 1;
uint32_t warp_now[kMaxThreads / kWarpSize];

std::string offset_in(const Region& region, const void* address) {
  return std::to_string(static_cast<const unsigned char*>(address) - region.begin) + " of " +
         std::to_string(region.bytes);
}

std::string place(const Region& region, const void* address) {
  return std::string(&region == &shared ? "shared" : "global") + " memory, byte " + offset_in(region, address);
}

// Whether everything recorded at `time` by thread or thread group `who` comes before what the running thread does now.
bool ordered(const Time& time, uint16_t who) {
  if (time.block < launch_start) return true;  // an earlier launch
  if (time.block < block_start) return false;  // another block of this launch
  if (time.block < now || who == current->index) return true;
  if (who == kManyReaders) return false;
  const int warp = who & kManyInWarp ? who & ~kManyInWarp : who / kWarpSize;
  return warp == current->warp && time.warp < warp_now[warp];
}
bool ordered(const Time& time, int thread, uint32_t clock) {
  return ordered(time, static_cast<uint16_t>(thread)) || knows(current->index, thread, clock);
}

std::string name_of(uint16_t who) {
  if (clocks_are_on() && who == copy_engine()) return "a bulk copy";
  if (who == kManyReaders) return "several warps";
  if (who & kManyInWarp) return "several lanes of warp " + std::to_string(who & ~kManyInWarp);
  return "warp " + std::to_string(who / kWarpSize) + " lane " + std::to_string(who % kWarpSize);
}

void record_read(Granule& granule) {
  const uint16_t self = static_cast<uint16_t>(current->index);
  const uint16_t before = granule.reader;
  const bool before_counts = !ordered(granule.read, before);
  granule.read = {now, warp_now[current->warp]};
  if (!before_counts) {
    granule.reader = self;
  } else if (before != kManyReaders) {
    const int warp = before & kManyInWarp ? before & ~kManyInWarp : before / kWarpSize;
    granule.reader = warp == current->warp ? static_cast<uint16_t>(kManyInWarp | warp) : kManyReaders;
  }
}

enum class Access { kRead, kWrite, kAtomic };

void check_granules(Region& region, const void* address, size_t bytes, Access access, const char* what) {
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - region.begin);
  for (size_t i = offset / region.granule; i <= (offset + bytes - 1) / region.granule; ++i) {
    Granule& g = region.granules[i];
    const bool write = access != Access::kRead;
    const bool both_atomic = access == Access::kAtomic && g.atomic;
    if (&region == &shared && g.written.block < block_start) {  // what an earlier block did to shared memory is void
      if (!write && kLoadsAndStoresAreReported)
        fail(std::string(what) + " reads " + place(region, address) + ", which nobody has written");
      g = Granule{};
      shared.reads[i].clear();
    }
    if (g.copying)
      fail(std::string(what) + (write ? " writes " : " reads ") + place(region, address) +
           ", into which cp.async still copies (issued by " + name_of(g.writer) + ")");
    if (!both_atomic && !ordered(g.written, g.writer, g.write_clock))
      fail("race: " + std::string(what) + (write ? " writes " : " reads ") + place(region, address) + ", written by " +
           (g.written.block < block_start ? "another block" : name_of(g.writer)) + " with no barrier in between");
    if (write && !both_atomic && !ordered(g.read, g.reader))
      fail("race: " + std::string(what) + " writes " + place(region, address) + ", read by " +
           (g.read.block < block_start ? "another block" : name_of(g.reader)) + " with no barrier in between");
    const bool exact = &region == &shared && clocks_are_on();
    const uint32_t clock = clock_of(current->index);
    if (exact && write && !both_atomic) {
      for (const Read& read : shared.reads[i])
        if (!ordered(read.time, read.thread, read.clock))
          fail("race: " + std::string(what) + " writes " + place(region, address) + ", read by " +
               name_of(static_cast<uint16_t>(read.thread)) + " with no barrier in between");
      shared.reads[i].clear();
    }
    if (write) {
      g.written = {now, warp_now[current->warp]};
      g.writer = static_cast<uint16_t>(current->index);
      g.write_clock = clock;
      g.atomic = access == Access::kAtomic;
    } else if (exact) {
      shared.reads[i].push_back({current->index, clock, {now, warp_now[current->warp]}});
    } else {
      record_read(g);
    }
  }
}

void check(const void* address, size_t bytes, Access access, const char* what) {
  const unsigned char* a = static_cast<const unsigned char*>(address);
  Region* region = nullptr;
  if (is_shared(address)) {
    region = &shared;
  } else if (heap.begin <= a && a < heap.begin + kHeapBytes) {
    const uint32_t index = heap.region_of_page[static_cast<size_t>(a - heap.begin) / kPage];
    if (index == 0) fail(std::string(what) + " accesses global memory outside every tensor");
    region = &heap.regions[index - 1];
  } else {
    return;  // the emulator's own memory, or a thread's registers and stack
  }
  if (a < region->begin || a + bytes > region->begin + region->bytes)
    fail(std::string(what) + " is out of bounds: " + std::to_string(bytes) + " bytes at " + place(*region, address));
  if (access != Access::kRead && region->read_only)
    fail(std::string(what) + " writes to a tensor that is only read: " + place(*region, address));
  check_granules(*region, address, bytes, access, what);
}

}  // namespace

void* allocate(size_t bytes, size_t granule) {
  const size_t size = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  if (heap.used + size + kPage > kHeapBytes) throw std::bad_alloc();
  unsigned char* begin = heap.begin + heap.used;
  Region region{begin, bytes, granule, false, std::make_unique<Granule[]>(bytes / granule + 1)};
  heap.regions.push_back(std::move(region));
  std::fill_n(heap.region_of_page.begin() + heap.used / kPage, size / kPage,
              static_cast<uint32_t>(heap.regions.size()));
  heap.used += size + kPage;
  __asan_unpoison_memory_region(begin, bytes);
  return begin;
}

void set_read_only(void* memory, bool read_only) {
  for (Region& region : heap.regions)
    if (region.begin == memory) region.read_only = read_only;
}

void free_all() {
  __asan_poison_memory_region(heap.begin, heap.used);
  std::fill_n(heap.region_of_page.begin(), heap.used / kPage, 0);
  heap.regions.clear();
  heap.used = kPage;
}

unsigned char* shared_memory() { return shared.begin; }

bool is_shared(const void* address) {
  const unsigned char* a = static_cast<const unsigned char*>(address);
  return shared.begin <= a && a < shared.begin + 2 * kMaxSharedBytes;
}

void check_read(const void* address, size_t bytes, const char* what) { check(address, bytes, Access::kRead, what); }
void check_write(const void* address, size_t bytes, const char* what) { check(address, bytes, Access::kWrite, what); }
void check_atomic(const void* address, size_t bytes) { check(address, bytes, Access::kAtomic, "an atomic"); }

static void begin_copy(void* destination, size_t bytes, const char* what) {
  check_write(destination, bytes, what);
  const size_t first = static_cast<size_t>(static_cast<unsigned char*>(destination) - shared.begin) / kSharedGranule;
  for (size_t i = first; i < first + bytes / kSharedGranule; ++i) shared.granules[i].copying = true;
}
void begin_copy_to_shared(void* destination, size_t bytes) { begin_copy(destination, bytes, "cp.async"); }
void begin_bulk_copy(void* destination, size_t bytes) { begin_copy(destination, bytes, "cp.async.bulk"); }

void end_bulk_copy(void* destination, size_t bytes) {
  const size_t first = static_cast<size_t>(static_cast<unsigned char*>(destination) - shared.begin) / kSharedGranule;
  for (size_t i = first; i < first + bytes / kSharedGranule; ++i) {
    Granule& g = shared.granules[i];
    g.copying = false;
    g.written = {now, 0};
    g.writer = static_cast<uint16_t>(copy_engine());
    g.write_clock = clock_of(copy_engine());
  }
}

void end_copy_to_shared(void* destination, size_t bytes) {
  const size_t first = static_cast<size_t>(static_cast<unsigned char*>(destination) - shared.begin) / kSharedGranule;
  for (size_t i = first; i < first + bytes / kSharedGranule; ++i) {
    Granule& g = shared.granules[i];
    g.copying = false;
    g.written = {now, warp_now[current->warp]};
    g.write_clock = clock_of(current->index);  // who learned of the thread's past before does not know of this
  }
}

Moment this_moment() { return {current->index, clock_of(current->index), now, warp_now[current->warp]}; }
bool comes_before_now(const Moment& moment) {
  return ordered({moment.block_time, moment.warp_time}, moment.thread, moment.clock);
}

void start_launch() { launch_start = block_start = ++now; }

void start_block(size_t shared_bytes) {
  if (shared_bytes > kMaxSharedBytes)
    throw KernelError("launch: " + std::to_string(shared_bytes) + " bytes of shared memory, and the limit is " +
                      std::to_string(kMaxSharedBytes));
  __asan_poison_memory_region(shared.begin, kMaxSharedBytes);
  __asan_unpoison_memory_region(shared.begin, shared_bytes);
  std::fill_n(shared.begin, shared_bytes, 0xFF);  // NaN in every floating-point type
  shared.bytes = shared_bytes;
  block_start = ++now;
}

void order_block() { ++now; }
void order_warp(int warp) {
  ++warp_now[warp];
  order_warp_clocks(warp);
}

}  // namespace emulation
